"""Numbers of a rollout step, computed exactly over tokens and reduced over ranks in one go."""

import torch
from accelerate import Accelerator

# what each optimizer step adds up over micro-batches and ranks; one vector, one all-reduce
STEP_SUMS = ("loss", "tokens", "low", "high", "dual", "ratio", "approx_kl")


@torch.no_grad()
def step_sums(loss, logps, old_logps, advantages, mask, epsilon_low, epsilon_high, delta) -> torch.Tensor:
    """One micro-batch's addends in the order of `STEP_SUMS`, `(7,)` float32 on its device; no host synchronisation.

    A token counts as clipped where the clip decides its loss: `low` and `high` as TRL counts them, `dual` where the bound
    `delta` takes over (ratio above it, negative advantage).
    """
    log_ratio = logps - old_logps
    ratio = log_ratio.exp()
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    dual = (ratio > delta) & (advantages < 0)
    columns = (mask, low * mask, high * mask, dual * mask, ratio * mask, (ratio - 1 - log_ratio) * mask)
    return torch.stack([loss.detach().float(), *(column.float().sum() for column in columns)])


def step_metrics(sums: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """Token means from the reduced `STEP_SUMS`, under TRL's names where it has one; and the loss, still a tensor."""
    loss, tokens, low, high, dual, ratio, kl = sums.tolist()
    count = max(tokens, 1.0)
    return {
        "clip_ratio/low_mean": low / count,
        "clip_ratio/high_mean": high / count,
        "clip_ratio/dual_mean": dual / count,
        "clip_ratio/region_mean": (low + high) / count,
        "ratio_mean": ratio / count,
        "approx_kl": kl / count,  # k3 estimate of KL(old || current)
        "tokens/trained": tokens,
    }, sums[0]


def rollout_metrics(entropies: torch.Tensor, mask: torch.Tensor, accelerator: Accelerator) -> dict[str, float]:
    """Entropy of the sampling policy over all response tokens of a rollout step.

    Args:
        entropies: `(B, T)` nats, from the scoring pass, i.e. before the first update (when verl logs it).
        mask: `(B, T)` bool, response tokens.
    """
    sums = torch.stack([(entropies * mask).sum(), mask.sum().float()])
    total, count = accelerator.reduce(sums, "sum").tolist()
    return {"entropy": total / max(count, 1.0)}
