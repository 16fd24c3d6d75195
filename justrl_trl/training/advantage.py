"""Group-relative advantages (GRPO; DeepSeekMath, arXiv 2402.03300, section 4.1.2) exactly as the reference computes them."""

import torch


def group_advantages(rewards: torch.Tensor, group_ids: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """`(reward - group mean) / (group std + epsilon)` with the unbiased standard deviation.

    A group of equal rewards gets advantage 0 and stays in the batch and in every token denominator. A group of one counts as
    mean 0 and standard deviation 1, as in the reference (`verl/trainer/ppo/core_algos.py`, `compute_grpo_outcome_advantage`).

    Args:
        rewards: `(B,)`, one scalar per response; NaN where no reward function knew one: it gets 0 and its group ignores it.
        group_ids: `(B,)` integers; responses to the same prompt share one, in any order.
        epsilon: numeric guard of the division.

    Returns:
        `(B,)` in the dtype of `rewards`.
    """
    if rewards.shape != group_ids.shape or rewards.dim() != 1:
        raise ValueError(f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} must be 1-D and alike.")
    known = ~rewards.isnan()
    advantages = torch.zeros_like(rewards)
    advantages[known] = _known_advantages(rewards[known], group_ids[known], epsilon)
    return advantages


def _known_advantages(rewards: torch.Tensor, group_ids: torch.Tensor, epsilon: float) -> torch.Tensor:
    _, group = torch.unique(group_ids, return_inverse=True)
    count = torch.bincount(group).to(rewards.dtype)
    zeros = torch.zeros_like(count)
    mean = zeros.index_add(0, group, rewards) / count
    centred = rewards - mean[group]
    variance = zeros.index_add(0, group, centred.square()) / (count - 1).clamp(min=1)
    single = count == 1
    mean, std = mean.masked_fill(single, 0.0), variance.sqrt().masked_fill(single, 1.0)
    return (rewards - mean[group]) / (std[group] + epsilon)
