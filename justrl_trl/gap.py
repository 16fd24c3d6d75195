"""Are rollouts samples of the policy that is trained? How far the servers' log-probabilities are from the trainer's says it.

Measured twice in a rollout step: on fixed sequences after every push (other weights, scrambled weights), and on a few of the
responses themselves (another sampler than the trainer believes). `weight_sync.WeightSync.gap` takes the measurements.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator

from justrl_trl.collectives import broadcast_ragged, on_rank_zero
from justrl_trl.dispatch import generate
from justrl_trl.packing import Sequence
from justrl_trl.pool import RolloutPool
from justrl_trl.rollout import Sampling
from justrl_trl.server import ServerError

PROBE_PROMPTS, PROBE_TOKENS = 4, 256


class Gap(NamedTuple):
    """Over response tokens, at temperature 1, in nats: largest and mean |log p_trainer - log p_server|; the k3 estimate of
    KL(server || trainer)."""

    largest: float
    mean: float
    k3: float


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


def check_push(gap: Gap, version: str, limit: float) -> dict[str, float]:
    """Metrics of the gap on the probe after a push.

    Raises:
        ServerError: if its mean is beyond `limit` (`sync_logprob_gap_limit`).
    """
    if not gap.mean <= limit:
        raise ServerError(
            f"After the push of weight version {version} trainer and server disagree on the probe tokens: |difference| of "
            f"log-probabilities {gap.mean:.3f} on average (max {gap.largest:.3f}) > sync_logprob_gap_limit={limit}. That is "
            "beyond bfloat16 noise: the server computes with other weights than the trainer. Check that both run the pinned "
            "versions and serve the same model."
        )
    return {"sync/logprob_gap_max": gap.largest, "sync/logprob_gap_mean": gap.mean}


def check_rollouts(gap: Gap, responses: int, *, warning: float, limit: float, say: Callable[[str], None]) -> dict[str, float]:
    """Metrics of the gap on responses of a rollout step: samples of a policy that is not the trainer's train it wrongly,
    however well the reward looks.

    Args:
        responses: how many were compared.
        warning, limit: `gap_warning`, `gap_limit`.
        say: where a warning goes.

    Raises:
        ServerError: if its mean is beyond `limit`.
    """
    told = f"trainer and server differ by {gap.mean:.3f} in log-probability, on average over {responses} responses"
    if not gap.mean <= limit:
        raise ServerError(
            f"In this rollout step {told} > gap_limit={limit}: what was sampled is not this policy's. Check that both run the "
            "pinned versions, and the sampling options of the server."
        )
    if gap.mean > warning:
        say(f"warning: {told} > gap_warning={warning}")
    return {"rollout/logprob_gap_max": gap.largest, "rollout/logprob_gap_mean": gap.mean, "rollout/logprob_kl": gap.k3}
