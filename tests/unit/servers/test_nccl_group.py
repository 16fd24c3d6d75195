"""NCCL waits for ever; its group does not: a member that hangs, dies or comes late costs the deadline and no more."""

import threading
import time

import pytest
import torch

from tests.unit.fake_nccl import FakeCommunicator, NcclGroupOnCpu

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def fresh():
    FakeCommunicator.reset()
    yield
    FakeCommunicator.released.set()


class Member(threading.Thread):
    """A member in a thread: joins, broadcasts `tensors` in order, keeps what went wrong and how long it took."""

    def __init__(self, port: int, rank: int, world_size: int, tensors: list[torch.Tensor], seconds: float = 10):
        super().__init__(daemon=True)
        self.group = NcclGroupOnCpu(HOST, port, rank, world_size, timeout_seconds=seconds)
        self.tensors, self.error, self.seconds = tensors, None, 0.0
        self.start()

    def run(self) -> None:
        started = time.monotonic()
        try:
            self.group.join()
            for tensor in self.tensors:
                self.group.broadcast(tensor)
        except Exception as error:
            self.error = error
        self.seconds = time.monotonic() - started

    def ended(self) -> Exception | None:
        self.join(timeout=20)
        assert not self.is_alive()
        return self.error


def formed(workers: int, sent: list[torch.Tensor], seconds: float = 10) -> list[Member]:
    """Rank 0 and `workers` that receive what it sends."""
    root = Member(0, 0, workers + 1, sent, seconds)
    empty = [[torch.empty_like(tensor) for tensor in sent] for _ in range(workers)]
    return [root, *(Member(root.group.port, rank, workers + 1, empty[rank - 1], seconds) for rank in range(1, workers + 1))]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_dtype_arrives_at_every_worker(workers):
    sent = [torch.randn(7, 5), torch.randn(3, 2).bfloat16(), torch.randn(9).to(torch.float8_e4m3fn), torch.tensor(3.25)]
    members = formed(workers, sent)
    assert [member.ended() for member in members] == [None] * len(members)
    for member in members[1:]:
        for got, original in zip(member.tensors, sent, strict=True):
            assert torch.equal(got.reshape(-1).view(torch.uint8), original.reshape(-1).view(torch.uint8))
    for member in members:
        member.group.close()
    assert FakeCommunicator.alive == []


def test_a_member_that_never_comes_costs_the_deadline_and_nobody_enters_nccls_join():
    root = Member(0, 0, 2, [], seconds=0.5)
    assert isinstance(root.ended(), RuntimeError) and 0.3 < root.seconds < 5
    assert FakeCommunicator.groups == {}


def test_a_join_that_hangs_in_nccl_is_a_failure_at_the_deadline():
    FakeCommunicator.hangs = {(1, "join")}
    members = formed(2, [], seconds=0.4)
    for member in members:
        error = member.ended()
        assert isinstance(error, TimeoutError) and "was not in the NCCL group after 0 s" in str(error)
        assert "NCCL_SOCKET_IFNAME" in str(error) and member.seconds < 5


def test_a_communicator_that_comes_after_the_deadline_is_aborted():
    FakeCommunicator.hangs = {(1, "join")}
    members = formed(1, [], seconds=0.5)
    assert all(isinstance(member.ended(), TimeoutError) for member in members)
    FakeCommunicator.released.set()
    deadline = time.monotonic() + 5
    while len(FakeCommunicator.events) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sorted(FakeCommunicator.events) == [(0, "abort"), (0, "join"), (1, "abort"), (1, "join")]
    assert FakeCommunicator.alive == []


def test_a_broadcast_that_a_member_hangs_in_is_aborted_at_the_deadline_by_all():
    FakeCommunicator.hangs = {(2, "broadcast")}
    members = formed(2, [torch.zeros(4)], seconds=0.5)
    for member in members:
        error = member.ended()
        assert isinstance(error, TimeoutError) and "aborted" in str(error) and member.seconds < 5
    assert FakeCommunicator.alive == []


def test_a_broadcast_ends_as_soon_as_it_is_known_that_nobody_listens():
    FakeCommunicator.hangs = {(1, "broadcast")}
    root, worker = formed(1, [], seconds=30)
    assert root.ended() is None and worker.ended() is None
    gone = threading.Timer(0.3, FakeCommunicator.dies.add, [99])
    gone.start()
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="it was stopped"):
        root.group.broadcast(torch.zeros(3), stop=lambda: 99 in FakeCommunicator.dies)
    assert 0.2 < time.monotonic() - started < 5, "the deadline is 30 s"
    with pytest.raises(RuntimeError, match="has left it"):
        root.group.broadcast(torch.zeros(3))


def test_an_error_of_nccl_is_raised():
    FakeCommunicator.dies = {0}
    root, worker = formed(1, [torch.zeros(3)], seconds=1)
    assert "remote process exited" in str(root.ended())
    assert isinstance(worker.ended(), TimeoutError)


def test_data_of_a_group_that_was_closed_meanwhile_is_not_taken_for_weights():
    FakeCommunicator.hangs = {(1, "broadcast")}
    tensor = torch.full((3,), 7.0)
    root, worker = formed(1, [], seconds=30)
    root.ended(), worker.ended()
    threading.Timer(0.3, worker.group.close).start()
    with pytest.raises(RuntimeError, match="closed during a broadcast"):
        worker.group.broadcast(tensor)
    assert tensor.tolist() == [7.0] * 3


def test_a_group_that_was_closed_has_aborted_its_communicator_before_the_next_one_joins():
    for _ in range(2):
        members = formed(1, [torch.ones(2)])
        assert [member.ended() for member in members] == [None, None]
        for member in members:
            member.group.close()
            member.group.close()  # twice is fine
    assert [event for _, event in FakeCommunicator.events] == ["join", "join", "abort", "abort"] * 2


def test_workers_end_with_rank_0_which_nccl_does_not_tell_them():
    FakeCommunicator.hangs = {(0, "broadcast")}
    root, *workers = formed(2, [], seconds=30)
    assert [member.ended() for member in (root, *workers)] == [None] * 3
    ended: list[int] = []
    waiting = [threading.Thread(target=receive, args=(worker.group, ended), daemon=True) for worker in workers]
    for thread in waiting:
        thread.start()
    time.sleep(0.3)
    started = time.monotonic()
    root.group.close()
    for thread in waiting:
        thread.join(10)
        assert not thread.is_alive()
    assert time.monotonic() - started < 5, "the deadline is 30 s"
    assert sorted(ended) == [1, 2] and FakeCommunicator.alive == []


def receive(group: NcclGroupOnCpu, ended: list[int]) -> None:
    with pytest.raises(TimeoutError, match="it was stopped"):
        group.broadcast(torch.zeros(3))
    ended.append(group.rank)
