"""A broadcast arrives bit by bit, a missing member costs no more than the deadline, and no port is open to others."""

import socket
import threading
import time

import psutil
import pytest
import torch

from justrl_trl.servers.gloo_group import GlooGroup

HOST = "127.0.0.1"


class Member(threading.Thread):
    """A worker in a thread: joins, receives into `tensors` in order, keeps what went wrong."""

    def __init__(self, port: int, rank: int, world_size: int, tensors: list[torch.Tensor]):
        super().__init__(daemon=True)
        self.group = GlooGroup(HOST, port, rank, world_size, timeout_seconds=20)
        self.tensors, self.error = tensors, None
        self.start()

    def run(self) -> None:
        try:
            self.group.join()
            for tensor in self.tensors:
                self.group.broadcast(tensor)
        except Exception as error:
            self.error = error

    def finish(self) -> None:
        self.join(timeout=30)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def formed(workers: int, received: list[list[torch.Tensor]]) -> tuple[GlooGroup, list[Member]]:
    root = GlooGroup(HOST, 0, 0, workers + 1, timeout_seconds=20)
    members = [Member(root.port, rank + 1, workers + 1, received[rank]) for rank in range(workers)]
    root.join()
    return root, members


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3.4e38])
    return [
        torch.randn(33, 17, generator=generator),
        special,
        torch.randn(5, 4, 3, generator=generator).to(torch.bfloat16),
        special.to(torch.bfloat16),
        torch.randn(9, generator=generator).to(torch.float8_e4m3fn),  # a type that gloo has never heard of
        torch.randn(3, generator=generator, dtype=torch.float64).to(torch.float16),
        torch.randint(-(2**62), 2**62, (8,), generator=generator),
        torch.tensor([True, False, True]),
        torch.tensor(3.25),  # no dimension
        torch.zeros(0, 4),  # no element
    ]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_every_dtype_arrives_bit_by_bit_at_every_worker(workers):
    sent = weights()
    received = [[torch.empty_like(tensor) for tensor in sent] for _ in range(workers)]
    root, members = formed(workers, received)
    for tensor in sent:
        root.broadcast(tensor)
    for member in members:
        member.finish()
    for tensors in received:
        for got, original in zip(tensors, sent, strict=True):
            assert bits(got) == bits(original), original.dtype
    for group in (root, *(member.group for member in members)):
        group.close()


def listening() -> set[tuple[str, int]]:
    """Addresses this process listens on."""
    connections = psutil.Process().net_connections(kind="tcp")
    return {tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN}


def test_store_and_data_sockets_listen_on_the_one_address_only():
    before = listening()
    tensor = torch.zeros(3)
    root, (member,) = formed(1, [[tensor]])
    during = listening() - before
    root.broadcast(torch.ones(3))
    member.finish()
    assert (HOST, root.port) in during
    assert {address for address, _ in during} == {HOST}
    root.close()
    member.group.close()


def test_a_missing_worker_costs_rank_0_no_more_than_the_deadline():
    root = GlooGroup(HOST, 0, 0, 2, timeout_seconds=1)
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        root.join()
    assert 0.5 < time.monotonic() - started < 10
    root.close()


def test_a_missing_trainer_costs_a_worker_no_more_than_the_deadline():
    with socket.create_server((HOST, 0)) as unused:
        port = unused.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        GlooGroup(HOST, port, 1, 2, timeout_seconds=1).join()
    assert time.monotonic() - started < 20


def test_a_broadcast_that_nobody_sends_ends_at_the_deadline():
    root = GlooGroup(HOST, 0, 0, 2, timeout_seconds=1)
    tensor = torch.zeros(4)
    member = Member(root.port, 1, 2, [])
    member.group.timeout = root.timeout
    root.join()
    member.finish()
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        member.group.broadcast(tensor)
    assert 0.5 < time.monotonic() - started < 10
    root.close()


def test_port_0_takes_a_free_port_that_is_known_before_joining():
    one, two = (GlooGroup(HOST, 0, 0, 2, timeout_seconds=1) for _ in range(2))
    assert one.port != two.port and 0 < one.port < 65536
    with socket.create_connection((HOST, one.port), timeout=5):
        pass  # workers may come before the trainer waits for them
    one.close()
    two.close()


def test_a_port_that_is_taken_is_an_error():
    with socket.create_server((HOST, 0)) as taken, pytest.raises(OSError, match="in use"):
        GlooGroup(HOST, taken.getsockname()[1], 0, 2, timeout_seconds=1)


def test_a_closed_group_leaves_no_port_open_and_the_next_one_works():
    before, received = listening(), torch.zeros(2)
    root, (member,) = formed(1, [[torch.zeros(2)]])
    root.broadcast(torch.ones(2))
    member.finish()
    root.close()
    member.group.close()
    root.close()  # twice is fine
    assert listening() == before
    root, (member,) = formed(1, [[received]])
    root.broadcast(torch.tensor([2.0, 3.0]))
    member.finish()
    assert received.tolist() == [2.0, 3.0]
