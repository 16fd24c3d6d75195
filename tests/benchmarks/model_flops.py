"""Floating-point operations that a rollout step needs of a decoder-only model, whatever a trainer computes on top of them.

    forward  = 2 x (parameters of the layers' matrices x tokens + parameters of the head x response tokens)
               + 4 x layers x heads x head_dim x sum over sequences of n^2 / 2
    training = 3 x forward        (a backward pass is two of them)
    scoring  = 1 x forward

A multiplication and an addition count as two. The attention term is the causal half of the products with keys and with values.
The head is counted where a token is scored, so once per response token. Padding, the second forward pass of gradient
checkpointing and the second pass that a fused loss makes over the head are work, but not work that the model needs: they lower
the utilization instead of raising it.
"""

from transformers import PretrainedConfig


def forward_flops(config: PretrainedConfig, lengths: list[tuple[int, int]]) -> float:
    """Operations of one forward pass over sequences of (prompt, response) tokens.

    Args:
        config: of a dense model with gated MLPs (Qwen2, Llama).
        lengths: prompt and response tokens of each sequence.
    """
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim
    layer = hidden * (2 * queries + keys_and_values) + 3 * hidden * config.intermediate_size
    totals = [prompt + response for prompt, response in lengths]
    matrices = config.num_hidden_layers * layer * sum(totals)
    head = hidden * config.vocab_size * sum(response for _, response in lengths)
    attention = 4 * config.num_hidden_layers * queries * sum(n * n for n in totals) / 2
    return 2 * (matrices + head) + attention


def utilization(forward: float, seconds: dict[str, float], peak_tflops: float) -> dict[str, float]:
    """Model FLOPs utilization of the training part, and of training and scoring together.

    Args:
        forward: from `forward_flops`, of the rollout step.
        seconds: of the rollout step's `training.old_logps`, `forward_backward` and `optimizer`.
        peak_tflops: what the device can do at most, in TFLOP/s.
    """
    training = seconds["forward_backward"] + seconds["optimizer"]
    return {
        "mfu_training": 3 * forward / training / (peak_tflops * 1e12),
        "mfu_training_and_scoring": 4 * forward / (training + seconds["scoring"]) / (peak_tflops * 1e12),
    }
