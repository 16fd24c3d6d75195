"""The broadcast group over gloo: any machine, CPU memory, TCP sockets on the one address that the user gives."""

import socket
from collections.abc import Callable

import torch
from torch.distributed import BroadcastOptions, ProcessGroupGloo, Store

from justrl_trl.servers.broadcast_group import BroadcastGroup


class GlooGroup(BroadcastGroup):
    """See `BroadcastGroup`. A member that dies closes its sockets, so the others get an error at once."""

    _group: ProcessGroupGloo | None = None

    def _connect(self, store: Store) -> None:
        options = ProcessGroupGloo._Options()
        options._timeout = self.timeout
        # Workers on this machine answer on the same address; remote ones on the interface that reaches the trainer.
        hostname = self.address if self.rank == 0 else _source_address(self.address, self.port)
        options._devices = [ProcessGroupGloo.create_device(hostname=hostname)]
        self._group = ProcessGroupGloo(store, self.rank, self.world_size, options)

    def broadcast(self, tensor: torch.Tensor, stop: Callable[[], bool] = lambda: False) -> None:
        if stop():
            raise RuntimeError("the broadcast was stopped")
        options = BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self.timeout
        data = tensor.cpu()
        # bytes on the wire: gloo has no notion of every dtype that a checkpoint may have
        self._group.broadcast([data.reshape(-1).view(torch.uint8)], options).wait()
        if self.rank and data is not tensor:
            tensor.copy_(data)

    def close(self) -> None:
        super().close()
        self._group = None


def _source_address(address: str, port: int) -> str:
    """The local IP that the kernel uses to reach `address`."""
    with socket.create_connection((address, port), timeout=10) as probe:
        return probe.getsockname()[0]
