"""The reference's additions to AdamW: warm-up per rollout step, and skipped updates that are not finite."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from justrl_trl.config import JustRLConfig
from justrl_trl.errors import JustRLError


class NonFiniteGradientError(JustRLError, RuntimeError):
    """Too many optimizer steps in a row had gradients that are not finite."""


def warmup_schedule(optimizer: torch.optim.Optimizer, args: JustRLConfig) -> LambdaLR:
    """Constant after a linear warm-up that advances once per rollout step: `min(1, k / warmup_rollout_steps)`, k from 0
    (reference: `verl/utils/torch_functional.py`, `get_constant_schedule_with_warmup`)."""

    def factor(global_step: int) -> float:
        return min(1.0, args.rollout_step(global_step) / args.warmup_rollout_steps) if args.warmup_rollout_steps else 1.0

    return LambdaLR(optimizer, factor)


class SkipCounter:
    """Counts optimizer steps that were skipped, and gives up when nothing else happens any more.

    Args:
        limit: skipped optimizer steps in a row that end the run (`max_skipped_steps`).
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._in_row = 0
        self.since_taken = 0

    def record(self, skipped: bool) -> None:
        """One more optimizer step.

        Raises:
            NonFiniteGradientError: when the last `limit` ones were all skipped.
        """
        self._in_row = self._in_row + 1 if skipped else 0
        self.since_taken += skipped
        if self._in_row >= self._limit:
            raise NonFiniteGradientError(
                f"{self._in_row} optimizer steps in a row had a gradient norm that is not finite, so none of them changed the "
                f"weights (max_skipped_steps={self._limit}). The loss does not recover by itself: look at the rewards and at "
                "entropy in metrics.jsonl, and go on from an earlier checkpoint with --resume_from_checkpoint and a lower "
                "--learning_rate."
            )

    def take(self) -> int:
        """Skipped optimizer steps since the last call."""
        count, self.since_taken = self.since_taken, 0
        return count


def is_finite(norm: torch.Tensor | float) -> bool:
    """Whether a gradient norm allows an update."""
    return math.isfinite(float(norm))
