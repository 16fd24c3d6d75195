"""Send weights from rank 0 to all servers of the pool, over gloo or NCCL."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial

from justrl_trl.background import Background
from justrl_trl.errors import ServerError
from justrl_trl.rollouts.pool import DOWN, Member, RolloutPool
from justrl_trl.servers.broadcast_group import BroadcastGroup
from justrl_trl.servers.gloo_group import GlooGroup
from justrl_trl.servers.nccl_group import NcclGroup
from justrl_trl.servers.vllm_plugin import GLOO_BACKEND, NCCL_BACKEND, GroupInfo, PushInfo
from justrl_trl.weights.stream import PolicyWeights, WireTensor

GROUPS: dict[str, type[BroadcastGroup]] = {GLOO_BACKEND: GlooGroup, NCCL_BACKEND: NcclGroup}
_PROBE_SECONDS = 5.0


class PushBroken(ServerError):
    """A push failed; servers that caused it were dropped, and the others can take another push."""


class WeightSender:
    """Rank 0's end of the broadcast group: all reachable servers of the pool, one group, renewed whenever its members change.

    A push is staged on all servers and used by all or by none: they load what they received only after every one of them has
    confirmed that it has everything. When one fails, the others drop what they staged, and a new group is formed without it.
    Servers are paused meanwhile: what they still decode for a request that was given up is aborted, and nothing is decoded
    with half of the new weights.

    Args:
        pool: of rank 0.
        group_class: what carries the data; all servers must have the engine for it.
        address, port, timeout_seconds: of the group.
    """

    def __init__(self, pool: RolloutPool, group_class: type[BroadcastGroup], address: str, port: int, timeout_seconds: float):
        self._pool, self._group_class, self._timeout = pool, group_class, timeout_seconds
        self._address, self._port = address, port
        self._generation = 0
        self._group: BroadcastGroup | None = None
        self._members: list[Member] = []
        self._formed_by: list[tuple[Member, int]] = []  # members and how often each had failed by then
        self._manifest: list[WireTensor] = []

    def send(self, weights: PolicyWeights, version: str) -> list[Member]:
        """One push, to every server that can be reached.

        Returns:
            The servers that now hold these weights.

        Raises:
            PushBroken: some server failed and is marked down; the others still hold their old weights.
        """
        reachable = self._pool.reachable()
        if not reachable:
            raise PushBroken("no server can be reached")
        try:
            self._send(reachable, weights, version)
        except BaseException:  # however it ends, no server is left paused or in an open update
            self._give_up()
            raise
        return self._members

    def _send(self, reachable: list[Member], weights: PolicyWeights, version: str) -> None:
        # a member that was lost and came back is a new process, which is in no group
        if self._group is None or self._formed_by != [(member, member.failures) for member in reachable]:
            self._connect(reachable, weights)
        self._each(lambda member: member.client.pause())
        self._each(lambda member: member.client.start_weight_update())
        announce = asdict(PushInfo(self._generation))
        receiving = [Background(partial(member.client.update_weights, announce)) for member in self._members]
        broadcast_error = None
        try:
            self._broadcast(weights, receiving)
        except (RuntimeError, TimeoutError) as error:  # a peer has gone or a deadline has passed
            broadcast_error = error
            self.close()  # ends the wait of members that still expect weights
        self._finish(receiving, "receiving weights")  # every answer is waited for, also after a broken broadcast
        if broadcast_error is not None:
            raise PushBroken(f"the broadcast of weights failed: {broadcast_error}")
        self._each(lambda member: member.client.finish_weight_update(version))
        self._each(lambda member: _read_back(member, version))
        self._each(lambda member: member.client.resume())

    def _connect(self, members: list[Member], weights: PolicyWeights) -> None:
        """Form a group of this trainer and the workers of all `members`; they check that these weights fit their model."""
        self.close()
        self._generation += 1
        self._members = list(members)
        self._formed_by = [(member, member.failures) for member in members]
        workers = dict(self._each(lambda member: member.client.world_size()))
        self._manifest = weights.metadata()
        world_size = 1 + sum(workers.values())
        self._group = self._group_class(self._address, self._port, 0, world_size, self._timeout)
        joining, offset = [], 1
        for member in self._members:
            info = GroupInfo(
                address=self._address,
                port=self._group.port,
                rank_offset=offset,
                world_size=world_size,
                timeout_seconds=self._timeout,
                generation=self._generation,
                names=[w.name for w in self._manifest],
                dtype_names=[str(w.dtype).removeprefix("torch.") for w in self._manifest],
                shapes=[list(w.shape) for w in self._manifest],
            )
            offset += workers[member.url]
            joining.append(Background(partial(member.client.init_weight_transfer_engine, asdict(info))))
        join = Background(self._group.join)
        while join.is_alive() and not any(call.error for call in joining):  # a refusal need not cost the deadline
            join.join(0.05)
        self._finish(joining, "joining the group")
        join.join(self._timeout)
        if join.error is not None or join.is_alive():
            raise PushBroken(f"the weight group was not joined: {join.error or 'deadline passed'}")

    def _broadcast(self, weights: PolicyWeights, receiving: list[Background]) -> None:
        def refused() -> bool:
            return any(call.error for call in receiving)

        for expected, (name, tensor) in zip(self._manifest, weights, strict=True):
            if WireTensor(name, tensor.dtype, tuple(tensor.shape)) != expected:  # gloo aborts a process on a wrong size
                raise ServerError(f"parameter {name} {tensor.dtype} {tuple(tensor.shape)} was announced as {expected}")
            self._group.broadcast(tensor, stop=refused)  # stops once a member has refused; `_finish` raises its error

    def _each(self, call: Callable[[Member], object]) -> list[tuple[str, object]]:
        """`call(member)` for all members at once; `(url, result)` of each."""
        results: dict[str, object] = {}
        calls = [Background(lambda m=member: results.__setitem__(m.url, call(m))) for member in self._members]
        self._finish(calls, "a weight update")
        return list(results.items())

    def _finish(self, calls: list[Background], during: str) -> None:
        """Wait for one call per member; if any failed, the push is broken."""
        for call in calls:
            call.join(2 * self._timeout)
            if call.is_alive():
                call.error, call.ended = TimeoutError(f"no answer after {2 * self._timeout:.0f} s"), time.monotonic()
        errors = [call.error for call in calls if call.error is not None]
        for error in errors:
            if "do not fit the served model" in str(error):  # another attempt would end the same way
                raise error
        if errors:
            for member, why in self._members_to_drop(calls):
                self._pool.lose(member, why)
            raise PushBroken(f"{during}: {errors[0]}")

    def _members_to_drop(self, calls: list[Background]) -> list[tuple[Member, object]]:
        """Members that caused the failure. One member's failure makes the others fail too, later; those stay. The cause is
        every member that does not answer a health check, or else the member whose error came first."""
        probes = [Background(partial(member.client.health, _PROBE_SECONDS)) for member in self._members]
        for probe in probes:
            probe.join(3 * _PROBE_SECONDS)
        gone = [(m, p.error) for m, p in zip(self._members, probes, strict=True) if p.error is not None]
        failed = [(call.ended, m, call.error) for m, call in zip(self._members, calls, strict=True) if call.error is not None]
        _, member, error = min(failed, key=lambda one: one[0])
        return gone or [(member, error)]

    def _give_up(self) -> None:
        """Drop the group, close the update on every server that answers, and let it decode again."""
        self.close()
        for member in self._members:
            if member.state != DOWN:
                member.client.abort_weight_update()
        for member in self._members:
            with suppress(ServerError):  # a member that is gone stays lost
                member.client.resume()

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None


def _read_back(member: Member, version: str) -> None:
    served = member.client.weight_version()
    if served != version:
        raise ServerError(f"{member.url} reports weight version {served!r} after a push of {version!r}.")
