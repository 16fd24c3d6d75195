"""How weights get from rank 0 to all servers of the pool: over gloo (any machine), or through vLLM's NCCL engine."""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from justrl_trl.gloo_group import GlooGroup
from justrl_trl.policy_weights import PolicyWeights, WireTensor
from justrl_trl.pool import DOWN, Member, RolloutPool
from justrl_trl.server import ServerError
from justrl_trl.vllm_plugin import BACKEND as GLOO_BACKEND
from justrl_trl.vllm_plugin import GlooInitInfo, GlooUpdateInfo

_PROBE_SECONDS = 5.0


class _Background(threading.Thread):
    """One call in a daemon thread: an HTTP call that returns only when the broadcast beside it has been joined."""

    def __init__(self, call: Callable[[], None]):
        super().__init__(daemon=True)
        self._call, self.error, self.ended = call, None, 0.0
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except Exception as error:  # looked at by whoever joins
            self.error, self.ended = error, time.monotonic()


class PushBroken(ServerError):
    """A push failed for the servers that were lost in it; the others may take another one."""


class GlooSender:
    """Rank 0's end of `GlooGroup`: all reachable servers of the pool, one group, renewed whenever its members change.

    A push is staged on all servers and used by all or by none: they load what they received only after every one of them has
    said that it has everything. When one fails, the others drop what they staged, and the group is made anew without it.
    """

    def __init__(self, pool: RolloutPool, address: str, port: int, timeout_seconds: float):
        self._pool, self._address, self._port, self._timeout = pool, address, port, timeout_seconds
        self._generation = 0
        self._group: GlooGroup | None = None
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
        # one that was lost and came back is another process, which knows nothing of the group
        if self._group is None or self._formed_by != [(member, member.failures) for member in reachable]:
            self._connect(reachable, weights)
        self._each(lambda member: member.client.start_weight_update())
        announce = asdict(GlooUpdateInfo(self._generation))
        receiving = [_Background(partial(member.client.update_weights, announce)) for member in self._members]
        broadcast_error = None
        try:
            self._broadcast(weights, receiving)
        except RuntimeError as error:  # gloo: a peer has gone or a deadline has passed
            broadcast_error = error
            self.close()  # those that still wait for weights hear of it now
        self._finish(receiving, "receiving weights")  # every answer is waited for, also after a broken broadcast
        if broadcast_error is not None:
            self._break(f"the broadcast of weights failed: {broadcast_error}")
        self._each(lambda member: member.client.finish_weight_update(version))
        self._each(lambda member: _read_back(member, version))
        return self._members

    def _connect(self, members: list[Member], weights: PolicyWeights) -> None:
        """Form a group of this trainer and the workers of all `members`; they check that these weights fit their model."""
        self.close()
        self._generation += 1
        self._members = list(members)
        self._formed_by = [(member, member.failures) for member in members]
        workers = dict(self._each(lambda member: member.client.world_size()))
        self._manifest = weights.metadata()
        world_size = 1 + sum(workers.values())
        self._group = GlooGroup(self._address, self._port, 0, world_size, self._timeout)
        joining, offset = [], 1
        for member in self._members:
            info = GlooInitInfo(
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
            joining.append(_Background(partial(member.client.init_weight_transfer_engine, asdict(info))))
        join = _Background(self._group.join)
        while join.is_alive() and not any(call.error for call in joining):  # a refusal need not cost the deadline
            join.join(0.05)
        self._finish(joining, "joining the group")
        join.join(self._timeout)
        if join.error is not None or join.is_alive():
            self._break(f"the weight group was not joined: {join.error or 'deadline passed'}")

    def _broadcast(self, weights: PolicyWeights, receiving: list[_Background]) -> None:
        for expected, (name, tensor) in zip(self._manifest, weights, strict=True):
            if WireTensor(name, tensor.dtype, tuple(tensor.shape)) != expected:  # gloo aborts a process on a wrong size
                raise ServerError(f"parameter {name} {tensor.dtype} {tuple(tensor.shape)} was announced as {expected}")
            if any(call.error for call in receiving):
                return  # refused: do not broadcast to a worker that is not listening
            self._group.broadcast(tensor.cpu())

    def _each(self, call: Callable[[Member], object]) -> list[tuple[str, object]]:
        """`call(member)` for all members at once; `(url, result)` of each."""
        results: dict[str, object] = {}
        calls = [_Background(lambda m=member: results.__setitem__(m.url, call(m))) for member in self._members]
        self._finish(calls, "a weight update")
        return list(results.items())

    def _finish(self, calls: list[_Background], during: str) -> None:
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
            for member, why in self._guilty(calls):
                self._pool.lose(member, why)
            self._break(f"{during}: {errors[0]}")

    def _guilty(self, calls: list[_Background]) -> list[tuple[Member, object]]:
        """Who broke it. One member's failure makes the others fail too, later, and those must not pay for it: so it is
        whoever does not answer a probe, or else whose error came first."""
        probes = [_Background(partial(member.client.health, _PROBE_SECONDS)) for member in self._members]
        for probe in probes:
            probe.join(3 * _PROBE_SECONDS)
        gone = [(m, p.error) for m, p in zip(self._members, probes, strict=True) if p.error is not None]
        failed = [(call.ended, m, call.error) for m, call in zip(self._members, calls, strict=True) if call.error is not None]
        _, member, error = min(failed, key=lambda one: one[0])
        return gone or [(member, error)]

    def _break(self, why: str) -> None:
        """Leave no server in an open update, drop the group, tell the caller."""
        self.close()
        for member in self._members:
            if member.state != DOWN:
                member.client.abort_weight_update()
        raise PushBroken(why)

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None


def _read_back(member: Member, version: str) -> None:
    served = member.client.weight_version()
    if served != version:
        raise ServerError(f"{member.url} reports weight version {served!r} after a push of {version!r}.")


class NcclSender:
    """vLLM's own packed NCCL engine behind the same call; imports vLLM, so only where there is a GPU.

    A push that breaks costs the servers in it: vLLM's engine loads while it receives, so they are restarted, not resumed.
    """

    def __init__(self, pool: RolloutPool, address: str, port: int, timeout_seconds: float):
        self._pool, self._address, self._port, self._timeout = pool, address, port, timeout_seconds
        self._engine = None
        self._members: list[Member] = []
        self._formed_by: list[tuple[Member, int]] = []
        self._version = ""

    def send(self, weights: PolicyWeights, version: str) -> list[Member]:
        """As `GlooSender.send`."""
        reachable = self._pool.reachable()
        if not reachable:
            raise PushBroken("no server can be reached")
        self._version = version
        try:
            formed_by = [(member, member.failures) for member in reachable]
            if self._engine is None or self._formed_by != formed_by:
                self._members, self._formed_by = reachable, formed_by
                self._engine = self._join(weights)
            self._engine.source = weights
            self._engine.send_weights()
            for member in self._members:
                _read_back(member, version)
        except Exception as error:  # NCCL's and vLLM's have no common type
            self._engine = None
            for member in self._members:
                self._pool.lose(member, error)
            raise PushBroken(f"NCCL push: {error}") from error
        return self._members

    def _join(self, weights: PolicyWeights):
        from trl.trainer.utils import _find_free_port
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info = NCCLTrainerInitInfo(
            master_address=self._address,
            master_port=self._port or _find_free_port(),
            world_size=1 + sum(member.client.world_size() for member in self._members),
            rank=0,
        )
        return WeightTransferTrainerFactory.trainer_init(info, client=self, source=weights)

    # the four calls that vLLM's engine makes on its client, passed on to every member at once
    def init_weight_transfer_engine(self, init_info: dict) -> None:
        offset, infos = init_info.get("rank_offset", 1), {}
        for member in self._members:
            infos[member.url] = {**init_info, "rank_offset": offset}
            offset += member.client.world_size()
        self._all(lambda member: member.client.init_weight_transfer_engine(infos[member.url]))

    def start_weight_update(self) -> None:
        self._all(lambda member: member.client.start_weight_update())

    def update_weights(self, update_info: dict) -> None:
        self._all(lambda member: member.client.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all(lambda member: member.client.finish_weight_update(self._version))

    def _all(self, call: Callable[[Member], object]) -> None:
        calls = [_Background(partial(call, member)) for member in self._members]
        for one in calls:
            one.join(2 * self._timeout)
            if one.error is not None:
                raise one.error


SENDERS = {GLOO_BACKEND: GlooSender, "nccl": NcclSender}
