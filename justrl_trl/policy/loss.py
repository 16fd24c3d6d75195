"""The objective in plain torch: PPO's ratio with an asymmetric clip (DAPO, arXiv 2503.14476, eq. 8-10) and a dual clip.

No KL term, no entropy bonus. Two ways to average over tokens, because the reference does not do what its name says.
"""

import torch


def policy_loss(
    per_token_logps: torch.Tensor,
    old_per_token_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    epsilon_low: float,
    epsilon_high: float,
    delta: float,
) -> torch.Tensor:
    """Clipped policy loss of each token (reference: `verl/trainer/ppo/core_algos.py`, `compute_policy_loss`).

    `max(-A r, -A clip(r, 1 - epsilon_low, 1 + epsilon_high))`, and for negative A at most `-A delta`.

    Args:
        per_token_logps, old_per_token_logps: `(B, T)` or `(N,)`, log-probabilities under the current and the sampling policy.
        advantages: same shape, or `(B,)` beside `(B, T)` log-probabilities.
        mask: same shape, 1 for response tokens.
        epsilon_low, epsilon_high, delta: 0.2, 0.28 and 10 in the recipe.

    Returns:
        Loss of each token, same shape, 0 where `mask` is 0.
    """
    if advantages.dim() < per_token_logps.dim():
        advantages = advantages.unsqueeze(-1)
    ratio = torch.exp(per_token_logps - old_per_token_logps)
    clipped = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - epsilon_low, 1 + epsilon_high))
    bounded = torch.where(advantages < 0, torch.minimum(clipped, -advantages * delta), clipped)
    return torch.where(mask.bool(), bounded, 0.0)


def normalize(
    per_token_loss: torch.Tensor,
    mask: torch.Tensor,
    mode: str,
    *,
    sequences_in_micro_batch: int,
    sequences_in_step: int,
    tokens_in_step: torch.Tensor | float,
) -> torch.Tensor:
    """One micro-batch's contribution to the loss of an optimizer step; contributions are summed over all ranks.

    `token_mean`: sum over its tokens / tokens of the whole optimizer step: the global token mean, however it is cut.
    `reference`: its own token mean x its share of the sequences. A token's weight then depends on the company it is cut into;
    the reference trains like this (`verl/workers/actor/dp_actor.py`, dynamic batches), so the paper recipes do too.

    Args:
        per_token_loss, mask: `(N,)` or `(B, T)`, tokens of this micro-batch.
        sequences_in_micro_batch: sequences in it.
        sequences_in_step, tokens_in_step: of the optimizer step, over all ranks.
    """
    total = (per_token_loss * mask).sum()
    return total / denominator(
        mode,
        tokens_in_micro_batch=mask.sum(),
        sequences_in_micro_batch=sequences_in_micro_batch,
        sequences_in_step=sequences_in_step,
        tokens_in_step=tokens_in_step,
    )


def denominator(
    mode: str,
    *,
    tokens_in_micro_batch: torch.Tensor | float,
    sequences_in_micro_batch: int,
    sequences_in_step: int,
    tokens_in_step: torch.Tensor | float,
) -> torch.Tensor | float:
    """What `normalize` divides a micro-batch's sum of token losses by; arguments as there."""
    if mode == "token_mean":
        return max(tokens_in_step, 1)  # every response may have been masked
    if mode == "reference":
        # token mean x share of the sequences; the guard is the reference's
        return (tokens_in_micro_batch + 1e-8) * (sequences_in_step / sequences_in_micro_batch)
    raise ValueError(f"loss_normalization={mode!r}: use 'reference' or 'token_mean'.")
