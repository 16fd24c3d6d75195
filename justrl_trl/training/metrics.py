"""Numbers of a rollout step, computed exactly over tokens. Each optimizer step sends one vector through one all-reduce and
brings it to the host once; whatever a rank has to tell travels in it."""

import resource

import torch
from accelerate import Accelerator

# what an optimizer step adds up over micro-batches and ranks
STEP_SUMS = ("loss", "tokens", "low", "high", "dual", "ratio", "approx_kl")
# what the scoring pass adds up over the rollout step; reported with its first optimizer step
SCORING_SUMS = ("entropy", "entropy_reference", "scored_tokens")


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


def scoring_sums(entropies: list[torch.Tensor], reference_order: list[int]) -> torch.Tensor:
    """One rank's addends in the order of `SCORING_SUMS`, `(3,)` float64.

    `entropy_reference` repeats the reference's mistake so that runs can be compared with Figures 2a and 3b of the paper: row i
    gets the entropies of row `reference_order[i]`, zero beyond their end, under its own mask. About 0.6 of the truth.

    Args:
        entropies: `(T_i,)` nats of each response token under the sampling policy, one tensor per sequence, in original order.
        reference_order: see `old_logps.reference_order`.
    """
    own = torch.stack([one.double().sum() for one in entropies]).sum()
    swapped = [entropies[j][: len(one)] for one, j in zip(entropies, reference_order, strict=True)]
    reference = torch.stack([one.double().sum() for one in swapped]).sum()
    return torch.stack([own, reference, own.new_tensor(sum(map(len, entropies)))])


def reduce_once(
    step: torch.Tensor, scoring: torch.Tensor | None, accelerator: Accelerator
) -> tuple[dict[str, float], torch.Tensor]:
    """Add up over ranks and turn into metrics: one all-reduce, one host synchronisation.

    Args:
        step: `(7,)` `STEP_SUMS` of this rank.
        scoring: `(3,)` `SCORING_SUMS` of this rank, or None where the optimizer step is not the first after scoring.

    Returns:
        Metrics, under TRL's names where it has one; and the loss of the optimizer step, still a tensor.
    """
    memory = step.new_zeros(accelerator.num_processes, dtype=torch.float64)
    memory[accelerator.process_index] = peak_memory_gib(accelerator.device)
    parts = [step.double(), memory, *([] if scoring is None else [scoring.double()])]
    reduced = accelerator.reduce(torch.cat(parts), "sum")
    values = reduced.tolist()
    metrics = step_metrics(values[: len(STEP_SUMS)])
    metrics["memory/peak_gib"] = max(values[len(STEP_SUMS) : len(STEP_SUMS) + accelerator.num_processes])
    if scoring is not None:
        entropy, reference, tokens = values[-len(SCORING_SUMS) :]
        metrics["entropy"] = entropy / max(tokens, 1.0)
        metrics["entropy_reference"] = reference / max(tokens, 1.0)
    return metrics, reduced[0].to(step.dtype)


def step_metrics(sums: list[float]) -> dict[str, float]:
    """Token means from the reduced `STEP_SUMS`."""
    _, tokens, low, high, dual, ratio, kl = sums
    count = max(tokens, 1.0)
    return {
        "clip_ratio/low_mean": low / count,
        "clip_ratio/high_mean": high / count,
        "clip_ratio/dual_mean": dual / count,
        "clip_ratio/region_mean": (low + high) / count,
        "ratio_mean": ratio / count,
        "approx_kl": kl / count,  # k3 estimate of KL(old || current)
        "tokens/trained": tokens,
    }


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: of the GPU by torch, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
