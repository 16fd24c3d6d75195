"""NCCL without a GPU, as far as `NcclGroup` sees it: members are threads of this process, and wait for each other without a
deadline, as NCCL's do."""

import threading

import torch

from justrl_trl.servers.nccl_group import NcclGroup


class FakeCommunicator:
    """Joins when all members have called it, and broadcasts when all have; only `abort` ends a wait.

    Attributes of the class, which tests set:
        hangs: ranks that never get into the group (`join`), or never take part in a broadcast (`broadcast`).
        dies: ranks whose broadcast raises, as NCCL does for some errors.
        alive: communicators that have not been aborted, of all members.
        events: what happened, in order: (rank, "join" or "abort").
    """

    groups: dict[bytes, dict] = {}
    lock = threading.Condition()
    hangs: set[tuple[int, str]] = set()
    dies: set[int] = set()
    alive: list["FakeCommunicator"] = []
    events: list[tuple[int, str]] = []
    released = threading.Event()  # lets those go on that hang in the join

    @classmethod
    def reset(cls) -> None:
        cls.groups, cls.hangs, cls.dies, cls.alive, cls.events = {}, set(), set(), [], []
        cls.released = threading.Event()

    @staticmethod
    def new_unique_id() -> bytes:
        return f"group {len(FakeCommunicator.groups)}".encode()

    def __init__(self, unique_id: bytes, rank: int, world_size: int, device: torch.device):
        cls = FakeCommunicator
        self._alive, self._events = cls.alive, cls.events  # a thread may outlive its test
        if (rank, "join") in cls.hangs:
            cls.released.wait()
        with cls.lock:
            group = cls.groups.setdefault(unique_id, {"joined": 0, "sent": [], "taken": {}})
            group["joined"] += 1
            cls.lock.notify_all()
            cls.lock.wait_for(lambda: group["joined"] >= world_size)
            self._rank, self._world_size, self._group, self._aborted, self._count = rank, world_size, group, False, 0
            self._alive.append(self)
            self._events.append((rank, "join"))

    def broadcast(self, data: torch.Tensor, stream: None) -> None:
        cls = FakeCommunicator
        if self._rank in cls.dies:
            raise RuntimeError("NCCL error: remote process exited")
        with cls.lock:
            number, self._count = self._count, self._count + 1
            if self._rank == 0:
                self._group["sent"].append(data)
            if (self._rank, "broadcast") not in cls.hangs:
                self._group["taken"][number] = self._group["taken"].get(number, 0) + 1
            cls.lock.notify_all()
            cls.lock.wait_for(lambda: self._aborted or self._group["taken"].get(number, 0) == self._world_size)
            if not self._aborted and self._rank:
                data.copy_(self._group["sent"][number])

    def abort(self) -> None:
        with FakeCommunicator.lock:
            self._aborted = True
            if self in self._alive:
                self._alive.remove(self)
                self._events.append((self._rank, "abort"))
            FakeCommunicator.lock.notify_all()


class NcclGroupOnCpu(NcclGroup):
    """The class under test, with that communicator and CPU memory."""

    communicator = FakeCommunicator

    def _current_device(self) -> torch.device:
        return torch.device("cpu")

    def _current_stream(self) -> None:
        return None
