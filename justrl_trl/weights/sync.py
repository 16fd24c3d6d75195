"""Push the policy to the servers, and prove that it arrived.

After every rollout step the policy's weights travel from rank 0 to the rollout servers (`stream`, `sender`),
stamped with a version. Then two checks, of every server: the version is read back, and the log-probabilities of fixed tokens
are compared between trainer and server. Stale or scrambled weights show there at once; "watch the reward" is not a test.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from justrl_trl.distributed import on_rank_zero, raise_together
from justrl_trl.errors import ServerError
from justrl_trl.policy.packing import Sequence
from justrl_trl.rollouts.client import RolloutClient, Unreachable
from justrl_trl.rollouts.pool import LIVE, STALE, AllServersDown, Member, RolloutPool
from justrl_trl.servers.vllm_plugin import GLOO_BACKEND, NCCL_BACKEND
from justrl_trl.weights.gap import Gap, differing, measure, widest
from justrl_trl.weights.sender import GROUPS, PushBroken, WeightSender
from justrl_trl.weights.stream import PolicyWeights

_ATTEMPTS = 3  # of a push, and one for each server that may be lost in it


class WeightSync:
    """Pushes the policy and proves it; every method is called on every rank.

    Args:
        accelerator: of the trainer.
        model: the unwrapped policy.
        pool: rank 0's servers; None on the other ranks.
        address, port: where rank 0 hosts the broadcast group; port 0 picks a free one.
        timeout_seconds: deadline of the join, of each broadcast, and half of it of each answer.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        pool: RolloutPool | None,
        *,
        address: str,
        port: int,
        timeout_seconds: float,
    ):
        self._accelerator, self._pool = accelerator, pool
        self.version: str | None = None
        self._weights = PolicyWeights(model, torch.bfloat16)
        self._weights.dtype, backend = on_rank_zero(lambda: _agreed(pool), accelerator)
        if accelerator.is_main_process:
            self._sender = WeightSender(pool, GROUPS[backend], address, port, timeout_seconds)
        self._turn = 0  # which server is asked first about responses

    def push(self, version: str) -> None:
        """Send the current policy to every server that can be reached, stamp it `version`, read the stamps back.

        A server that fails in it is marked down, and the others get another push: the weights pass once per attempt.

        Raises:
            AllServersDown (rank 0) / RuntimeError (others): if no server is left and none comes back in time.
        """
        attempt = 1
        while not self._attempt(version, attempt):
            attempt += 1
        self.version = version

    def _attempt(self, version: str, attempt: int) -> bool:
        """One pass of the weights; whether it arrived."""
        # before the pass: once it has begun, the other ranks wait in a gather
        on_rank_zero(lambda: self._pool.wait_for_one((LIVE, STALE)), self._accelerator)
        error, arrived = None, False
        if self._accelerator.is_main_process:
            iter(self._weights)  # a pass to drain, even if `send` fails before it begins one
            try:
                with self._pool.update():
                    self._pool.current(self._sender.send(self._weights, version), version)
                arrived = True
            except PushBroken as caught:
                if attempt > _ATTEMPTS + len(self._pool.members):
                    error = AllServersDown(
                        f"The push of weights failed {attempt} times. {self._pool.describe()} Last: {caught}"
                    )
            except Exception as caught:
                error = caught
            self._weights.drain()
        else:
            for _ in self._weights:
                pass
        raise_together(error, self._accelerator)
        return bool(broadcast_object_list([arrived])[0])

    def prove(self, probe: list[Sequence], logps: torch.Tensor, limit: float) -> Gap | None:
        """Compare the trainer with every live server on the same sequences; drop servers that differ.

        Args:
            probe: prompts with responses; only rank 0's are looked at.
            logps: `(N,)`, the trainer's log-probabilities of all their response tokens in order, temperature 1.
            limit: mean |difference| beyond which a server differs (`sync_logprob_gap_limit`).

        Returns:
            The widest of those that agree, the same on every rank. None if no live server was left to ask.

        Raises:
            ServerError (rank 0) / StoppedByRankZero (others): if all of them differ.
        """
        trainer = logps.float().cpu()  # here: the other thread has a CUDA stream of its own, which waits for nothing
        return on_rank_zero(lambda: self._prove(probe, trainer, limit), self._accelerator)

    def _prove(self, probe: list[Sequence], logps: torch.Tensor, limit: float) -> Gap | None:
        live = self._pool.live()
        gaps = measure({member: probe for member in live}, {member: logps for member in live}, self._pool.lose)
        wrong = differing(gaps, self.version, limit)
        if wrong and len(wrong) == len(gaps):
            each = " ".join(f"{url}: {why}." for url, why in wrong.items())
            raise ServerError(
                f"No server has the trainer's weights. {each} Check that both run the pinned versions and serve the same model."
            )
        for member in live:
            if member.url in wrong:
                self._pool.exclude(member, wrong[member.url])
        agreeing = [gap for url, gap in gaps.items() if url not in wrong]
        return widest(agreeing) if agreeing else None

    def gap(self, sequences: list[Sequence], logps: torch.Tensor) -> dict[str, Gap]:
        """Compare trainer and servers on some responses, each of which one server is asked about; they take turns.

        Args:
            sequences, logps: as in `prove`.

        Returns:
            By server, the same on every rank. Empty if there was nothing to compare: no sequences, or no live server.
        """
        trainer = logps.float().cpu()
        return on_rank_zero(lambda: self._compare(sequences, trainer), self._accelerator)

    def _compare(self, sequences: list[Sequence], logps: torch.Tensor) -> dict[str, Gap]:
        live = self._pool.live()
        if not live or not sequences:
            return {}
        parts = logps.split([s.response_length for s in sequences])
        shares: dict[Member, list[Sequence]] = {}
        theirs: dict[Member, list[torch.Tensor]] = {}
        for place, (sequence, part) in enumerate(zip(sequences, parts, strict=True), start=self._turn):
            member = live[place % len(live)]
            shares.setdefault(member, []).append(sequence)
            theirs.setdefault(member, []).append(part)
        self._turn += len(sequences)
        return measure(shares, {member: torch.cat(rows) for member, rows in theirs.items()}, self._pool.lose)


def _agreed(pool: RolloutPool) -> tuple[torch.dtype, str]:
    """Weight dtype and transfer backend of the servers, which must be the same everywhere, also where one joins later."""
    seen: dict[str, tuple[str, str]] = {}
    while not seen:
        pool.wait_for_one((LIVE, STALE))
        for member in pool.reachable():
            try:
                seen[member.url] = _weights_wanted(member.client)
            except Unreachable as error:
                pool.lose(member, error)
    if len(set(seen.values())) > 1:
        raise ServerError(f"The servers differ in weight dtype or transfer backend: {seen}. One push cannot feed them all.")
    agreed = next(iter(seen.values()))

    def check(client: RolloutClient) -> None:
        if _weights_wanted(client) != agreed:
            raise ServerError(f"{client.url} takes weights as {_weights_wanted(client)}, the other servers as {agreed}.")

    pool.require(check)
    return getattr(torch, agreed[0]), agreed[1]


def _weights_wanted(client: RolloutClient) -> tuple[str, str]:
    """Dtype name and transfer backend of one server."""
    config = client.vllm_config()
    with client.understanding("/server_info"):
        dtype = config["model_config"]["dtype"].removeprefix("torch.")
    backend = (config.get("weight_transfer_config") or {}).get("backend")
    if backend not in GROUPS:
        raise ServerError(
            f"The server at {client.url} has weight transfer backend {backend!r}; this trainer can feed {sorted(GROUPS)}. "
            f'Start it with --weight-transfer-config \'{{"backend": "{GLOO_BACKEND}"}}\' (any machine) or '
            f'\'{{"backend": "{NCCL_BACKEND}"}}\' (a GPU of its own); justrl_trl must be installed there. vLLM\'s own "nccl" '
            "is not used: it has no deadline, and a push that breaks leaves its server without a model."
        )
    return dtype, backend
