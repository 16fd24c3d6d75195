"""The broadcast group between the trainer's rank 0 and the rollout workers, over gloo.

It lives beside `torch.distributed`'s default group (the ranks of the trainer): own store, own port, own deadline. The store
and the data sockets bind the one address that the user gives, never all interfaces.
"""

import ipaddress
import socket
from datetime import timedelta

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore


class GlooGroup:
    """A broadcast-only process group; rank 0 (the trainer) hosts the store.

    Args:
        address: host name or IP that rank 0 listens on and the workers connect to.
        port: TCP port of the store; rank 0 may pass 0 and read the chosen one from `.port` before `join()`.
        rank: 0 for the trainer, 1.. for the workers.
        world_size: number of members, the trainer included.
        timeout_seconds: longest wait for the join and for each broadcast. A worker that waits for a broadcast serves no
            prompt, so this is also the longest stall of a server whose trainer has died.
    """

    def __init__(self, address: str, port: int, rank: int, world_size: int, timeout_seconds: float):
        self.address, self.port, self.rank, self.world_size = address, port, rank, world_size
        self._timeout = timedelta(seconds=timeout_seconds)
        self._listener = None
        self._group = None
        if rank == 0:
            self._listener = socket.create_server((address, port), family=address_family(address))
            self.port = self._listener.getsockname()[1]

    def join(self) -> None:
        """Block until every member has joined.

        Raises:
            torch.distributed.DistError / RuntimeError: if they have not within `timeout_seconds`.
        """
        listen = {"master_listen_fd": self._listener.detach()} if self._listener is not None else {}
        store = TCPStore(
            self.address,
            self.port,
            self.world_size,
            is_master=self.rank == 0,
            timeout=self._timeout,
            wait_for_workers=False,
            **listen,
        )
        options = ProcessGroupGloo._Options()
        options._timeout = self._timeout
        # Workers on this machine answer on the same address; remote ones on the interface that reaches the trainer.
        hostname = self.address if self.rank == 0 else _source_address(self.address, self.port)
        options._devices = [ProcessGroupGloo.create_device(hostname=hostname)]
        self._group = ProcessGroupGloo(PrefixStore("justrl", store), self.rank, self.world_size, options)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send (rank 0) or fill (others) a contiguous CPU tensor in place."""
        options = BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self._timeout
        # bytes on the wire: gloo has no notion of every dtype that a checkpoint may have
        self._group.broadcast([tensor.reshape(-1).view(torch.uint8)], options).wait()

    def close(self) -> None:
        """Drop the group; the next one gets a new port."""
        if self._listener is not None:
            self._listener.close()
        self._group = self._listener = None


def address_family(address: str) -> socket.AddressFamily:
    """IPv6 only for a literal IPv6 address; host names resolve to IPv4 as in torch's launcher."""
    try:
        return socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    except ValueError:
        return socket.AF_INET


def _source_address(address: str, port: int) -> str:
    """The local IP that the kernel uses to reach `address`."""
    with socket.create_connection((address, port), timeout=10) as probe:
        return probe.getsockname()[0]
