"""Measure and judge the gap between log-probabilities of trainer and servers.

Measured twice in a rollout step: on fixed sequences after every push, at every server (other weights, scrambled weights), and
on a few of the responses themselves (another sampler than the trainer believes). `sync.WeightSync` takes the
measurements.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator

from justrl_trl.background import Background, wait_for
from justrl_trl.distributed import broadcast_ragged, on_rank_zero
from justrl_trl.errors import ServerError
from justrl_trl.policy.packing import Sequence
from justrl_trl.rollouts.client import RequestRefused, Sampling
from justrl_trl.rollouts.dispatch import generate
from justrl_trl.rollouts.pool import Member, RolloutPool

PROBE_PROMPTS, PROBE_TOKENS = 4, 256


class Gap(NamedTuple):
    """Over response tokens, at temperature 1, in nats: largest and mean |log p_trainer - log p_server|; the k3 estimate of
    KL(server || trainer)."""

    largest: float
    mean: float
    k3: float

    @staticmethod
    def between(trainer: torch.Tensor, server: torch.Tensor) -> "Gap":
        """Of log-probabilities `(N,)` of the same tokens, N >= 1, on the CPU."""
        difference = trainer - server
        k3 = difference.exp() - 1 - difference
        return Gap(float(difference.abs().max()), float(difference.abs().mean()), float(k3.mean()))


def widest(gaps: Iterable[Gap]) -> Gap:
    """The largest of each figure; what is not a number counts as largest."""
    return Gap(*(max(values, key=lambda value: (math.isnan(value), value)) for values in zip(*gaps, strict=True)))


def measure(
    asked: dict[Member, list[Sequence]], logps: dict[Member, torch.Tensor], lose: Callable[[Member, ServerError], None]
) -> dict[str, Gap]:
    """The gap of each server on its sequences; all servers are asked at once.

    Args:
        asked: prompts with responses, by server.
        logps: `(N,)` on the CPU, the trainer's log-probabilities of their response tokens in order, by server.
        lose: called for a server that fails, which is left out: that is no reason to end a run.

    Returns:
        By URL.

    Raises:
        RequestRefused: no server would score these tokens.
    """

    def ask(member: Member) -> Gap | None:
        try:
            served = [member.client.prompt_logprobs(s.ids.tolist())[s.prompt_length - 1 :] for s in asked[member]]
        except RequestRefused:
            raise
        except ServerError as error:
            lose(member, error)
            return None
        return Gap.between(logps[member], torch.tensor([value for part in served for value in part]))

    calls = {member.url: Background(partial(ask, member)) for member in asked}
    for call in calls.values():
        wait_for(call)  # each of its requests has a deadline
    return {url: call.result for url, call in calls.items() if call.result is not None}


def make_probe(
    prompts: list[list[int]], sampling: Sampling, pool: RolloutPool | None, accelerator: Accelerator
) -> list[Sequence]:
    """A response of the servers to each prompt, on every rank. Made of the policy as it is at the first push, it is text that
    the policy finds likely, where bfloat16 noise is small and a change of weights shows.

    Raises:
        ServerError (rank 0) / StoppedByRankZero (others): if no server answers.
    """
    rows: list[list[int]] = []
    on_rank_zero(lambda: rows.extend(generate(pool, prompts, sampling)), accelerator)
    everywhere = broadcast_ragged(rows, len(prompts), accelerator)
    return [
        Sequence(torch.cat([torch.tensor(prompt), row.long()]), len(prompt))
        for prompt, row in zip(prompts, everywhere, strict=True)
    ]


def differing(gaps: dict[str, Gap], version: str, limit: float) -> dict[str, str]:
    """Servers that compute with other weights than the trainer after a push of `version`, and what to say of each.

    Args:
        gaps: on the probe, by server.
        limit: `sync_logprob_gap_limit`, of the mean.
    """
    return {
        url: f"after the push of weight version {version} it disagrees with the trainer on the probe tokens: |difference| of "
        f"log-probabilities {gap.mean:.3f} on average (max {gap.largest:.3f}) > sync_logprob_gap_limit={limit}. That is beyond "
        "bfloat16 noise: it computes with other weights"
        for url, gap in gaps.items()
        if not gap.mean <= limit
    }


def check_rollouts(
    gaps: dict[str, Gap], responses: int, *, warning: float, limit: float, say: Callable[[str], None]
) -> dict[str, float]:
    """Metrics of the gap on responses of a rollout step: samples of a policy that is not the trainer's train it wrongly,
    however well the reward looks.

    Args:
        gaps: by server, each on its share of the responses.
        responses: how many were compared.
        warning, limit: `gap_warning`, `gap_limit`.
        say: where a warning goes.

    Raises:
        ServerError: if the mean of a server is beyond `limit`.
    """

    def describe(beyond: float) -> str:
        far = [f"{url} by {gap.mean:.3f}" for url, gap in gaps.items() if not gap.mean <= beyond]
        return f"{' and '.join(far)} in log-probability, on average over its share of {responses} responses"

    gap = widest(gaps.values())
    if not gap.mean <= limit:
        raise ServerError(
            f"In this rollout step trainer and server differ: {describe(limit)} > gap_limit={limit}. What was sampled is not "
            "this policy's. Check that both run the pinned versions, and the sampling options of the server."
        )
    if gap.mean > warning:
        say(f"warning: trainer and server differ: {describe(warning)} > gap_warning={warning}")
    return {"rollout/logprob_gap_max": gap.largest, "rollout/logprob_gap_mean": gap.mean, "rollout/logprob_kl": gap.k3}
