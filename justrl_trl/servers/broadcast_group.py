"""Base class of the broadcast groups between rank 0 and the rollout workers: rendezvous over one address.

It lives beside `torch.distributed`'s default group (the ranks of the trainer): own store, own port, own deadline. The store
binds the one address that the user gives, never all interfaces. `gloo_group` and `nccl_group` are the two that there are.
"""

import ipaddress
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, Store, TCPStore


class BroadcastGroup(ABC):
    """A broadcast-only group; rank 0 (the trainer) hosts the store.

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
        self.timeout = timedelta(seconds=timeout_seconds)
        self._listener = None
        if rank == 0:
            self._listener = socket.create_server((address, port), family=address_family(address))
            self.port = self._listener.getsockname()[1]

    def join(self) -> None:
        """Block until every member has joined.

        Raises:
            RuntimeError (torch.distributed.DistError) / TimeoutError: if they have not within `timeout_seconds`.
        """
        listen = {"master_listen_fd": self._listener.detach()} if self._listener is not None else {}
        store = TCPStore(
            self.address,
            self.port,
            self.world_size,
            is_master=self.rank == 0,
            timeout=self.timeout,
            wait_for_workers=False,
            **listen,
        )
        self._connect(PrefixStore("justrl", store))

    @abstractmethod
    def _connect(self, store: Store) -> None:
        """Join the other members, found through `store`."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, stop: Callable[[], bool] = lambda: False) -> None:
        """Send (rank 0) or fill (others) a contiguous tensor in place, on any device; the data is there when it returns.

        Args:
            stop: asked while it waits; once true, the broadcast ends as at its deadline.

        Raises:
            RuntimeError / TimeoutError: a member has gone, or the deadline has passed. The group is of no use any more.
        """

    def close(self) -> None:
        """Leave the group, in the middle of a broadcast too; the next one gets a new port."""
        if self._listener is not None:
            self._listener.close()
        self._listener = None


def address_family(address: str) -> socket.AddressFamily:
    """IPv6 only for a literal IPv6 address; host names resolve to IPv4 as in torch's launcher."""
    try:
        return socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    except ValueError:
        return socket.AF_INET
