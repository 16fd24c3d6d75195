"""The broadcast group over NCCL: workers that have a GPU of their own, on this machine or another.

NCCL has no deadline: neither `ncclCommInitRank` nor a broadcast ends when a member dies. So each runs in a thread that the
caller waits for, and is aborted at the deadline. The bindings are vLLM's: they can abort, and join a group that is none of
`torch.distributed`'s.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed import Store

from justrl_trl.servers.broadcast_group import BroadcastGroup

_POLL_SECONDS = 0.2
_ENDED = "ended"  # key of the store
_ABORT_SECONDS = 5.0  # for a call to end after its communicator was aborted


class Communicator:
    """One member's NCCL communicator, on the device that is current in the calling thread.

    Args:
        unique_id: the bytes that rank 0 got from `new_unique_id`.
        rank, world_size: of this member, of the group. The constructor returns when all have called it.
        device: that tensors are on.
    """

    def __init__(self, unique_id: bytes, rank: int, world_size: int, device: torch.device):
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

        self._device = device
        with torch.cuda.device(device):
            self._nccl = PyNcclCommunicator.from_unique_id_bytes(unique_id, rank, world_size, device)
        if self._nccl.disabled:
            raise RuntimeError("vLLM has switched its NCCL bindings off (VLLM_DISABLE_PYNCCL, or a group of one)")

    @staticmethod
    def new_unique_id() -> bytes:
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        return bytes(NCCLLibrary().ncclGetUniqueId().internal)

    def broadcast(self, data: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Rank 0's bytes `(N,)` uint8 to everyone, behind what `stream` has to do; returns when they are there."""
        with torch.cuda.device(self._device):
            self._nccl.broadcast(data, src=0, stream=stream)
            done = torch.cuda.Event()
            done.record(stream)
            done.synchronize()

    def abort(self) -> None:
        """End what is under way, in other threads too, and give the communicator back."""
        self._nccl.destroy()  # waits for ncclCommAbort for 5 s at most


class NcclGroup(BroadcastGroup):
    """See `BroadcastGroup`. Every wait for NCCL ends at the deadline, and the communicator with it.

    Attributes:
        device: the GPU that this member sends from or receives on.
    """

    communicator = Communicator  # unit tests have no GPU and put another one here

    def __init__(self, address: str, port: int, rank: int, world_size: int, timeout_seconds: float):
        super().__init__(address, port, rank, world_size, timeout_seconds)
        self.device = self._current_device()
        self._communicator: Communicator | None = None
        self._store: Store | None = None

    def _connect(self, store: Store) -> None:
        self._store = store
        if self.rank == 0:
            store.set("id", self.communicator.new_unique_id())
        # wait for all members here, because NCCL's own join has no deadline
        store.set(f"member {self.rank}", "")
        store.wait([f"member {rank}" for rank in range(self.world_size)], self.timeout)
        unique_id = store.get("id")
        call = _Call(lambda: self.communicator(unique_id, self.rank, self.world_size, self.device))
        if call.ends_within(self.timeout):
            self._communicator = call.result()
            return
        call.when_late(lambda communicator: communicator.abort())
        raise TimeoutError(
            f"member {self.rank} of {self.world_size} was not in the NCCL group after {self.timeout.total_seconds():.0f} s "
            "(weight_sync_timeout), though all members were there. NCCL_DEBUG=INFO in the environment shows what it waits for; "
            "between machines that is most often the interface (NCCL_SOCKET_IFNAME)."
        )

    def broadcast(self, tensor: torch.Tensor, stop: Callable[[], bool] = lambda: False) -> None:
        communicator = self._communicator
        if communicator is None:
            raise RuntimeError("this member has not joined the NCCL group, or has left it")
        data = tensor.to(self.device) if self.rank == 0 else torch.empty_like(tensor, device=self.device)
        stream = self._current_stream()  # another thread's current stream is another one
        call = _Call(lambda: communicator.broadcast(data.reshape(-1).view(torch.uint8), stream))
        if not call.ends_within(self.timeout, lambda: stop() or self._ended_by_rank_zero()):
            late = f"no end after {self.timeout.total_seconds():.0f} s (weight_sync_timeout)"
            why = "it was stopped" if stop() or self._ended_by_rank_zero() else late
            self._abort()
            call.ends_within(timedelta(seconds=_ABORT_SECONDS))  # `data` must outlive the kernel that reads it
            if self.rank == 0:
                time.sleep(2 * _POLL_SECONDS)  # time for workers to read it before the store is gone
            raise TimeoutError(f"an NCCL broadcast was aborted: {why}")
        call.result()
        if self._communicator is not communicator:  # an aborted kernel ends like any other
            raise RuntimeError("the NCCL group was closed during a broadcast")
        if self.rank:
            tensor.copy_(data)

    def close(self) -> None:
        super().close()
        self._abort()
        self._store = None

    def _abort(self) -> None:
        communicator, self._communicator = self._communicator, None
        if self.rank == 0 and self._store is not None:
            self._store.set(_ENDED, "")  # NCCL does not tell the others
        if communicator is not None:
            communicator.abort()

    def _ended_by_rank_zero(self) -> bool:
        """Whether rank 0 has left the group: it set the key, or its store is gone."""
        store = self._store
        if self.rank == 0 or store is None:
            return False
        try:
            return store.check([_ENDED])
        except RuntimeError:  # torch.distributed.DistError
            return True

    def _current_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def _current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)


class _Call(threading.Thread):
    """One call that may never return, in a daemon thread."""

    def __init__(self, call: Callable[[], object]):
        super().__init__(daemon=True)
        self._call, self._result, self._error = call, None, None
        self._late: Callable[[object], None] | None = None
        self._lock = threading.Lock()
        self._ended = False
        self.start()

    def run(self) -> None:
        try:
            result, error = self._call(), None
        except BaseException as caught:  # raised by `result`
            result, error = None, caught
        with self._lock:
            self._result, self._error, self._ended = result, error, True
            late = self._late
        if late is not None and error is None:
            late(result)

    def ends_within(self, timeout: timedelta, stop: Callable[[], bool] = lambda: False) -> bool:
        """Wait for its end; False at the deadline, or once `stop()` is true."""
        deadline = time.monotonic() + timeout.total_seconds()
        while not stop() and (left := deadline - time.monotonic()) > 0:
            self.join(min(_POLL_SECONDS, left))
            if not self.is_alive():
                return True
        return not self.is_alive()

    def result(self) -> object:
        if self._error is not None:
            raise self._error
        return self._result

    def when_late(self, then: Callable[[object], None]) -> None:
        """Call `then` with the result if it still comes."""
        with self._lock:
            self._late = then
            late = self._ended and self._error is None
        if late:
            then(self._result)
