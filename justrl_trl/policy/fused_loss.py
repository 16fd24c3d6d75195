"""LM head and objective in one kernel that never holds a `(tokens, vocabulary)` matrix.

`loss_backend: liger` is Liger's fused linear GRPO loss; gradients of the head are computed in the forward pass. `trl` is TRL's
own chunked head, which yields log-probabilities for the readable `loss.policy_loss`. Both run inside the model's forward pass,
where DeepSpeed's and DDP's hooks see the head.
"""

import functools
import inspect
import types
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from justrl_trl.errors import ConfigError

# what TRL's head applies to logits and Liger's does not, with the value that means "nothing"
_LOGIT_CHANGES = {"final_logit_softcapping": None, "logit_scale": 1.0, "output_multiplier": 1.0, "lm_head_multiplier": 1.0}
_LOGIT_CHANGES["logits_scaling"] = 1.0
_ONE_CHUNK = 2**31  # Liger tiles rows x vocabulary by itself; more chunks only cost a head-sized gradient buffer each


@dataclass
class LigerOutput(ModelOutput):
    """Output of a model called with `liger=...`.

    Args:
        loss: scalar, the micro-batch's contribution to the loss of the optimizer step.
        log_probs: `(N,)` of the response tokens, without gradient.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None


_SIGNATURE = inspect.signature(LigerFusedLinearGRPOFunction.forward)
_INPUTS = len(_SIGNATURE.parameters) - 1  # without ctx


class _PolicyLoss(LigerFusedLinearGRPOFunction):
    """Liger's function, with the log-probabilities that it computes anyway handed out: without them there would be no clip
    fractions by side, no dual clip fraction and no KL estimate."""

    @staticmethod
    def ppo_loss_fn(per_token_logps, **kwargs):
        loss, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(per_token_logps=per_token_logps, **kwargs)
        return loss, [per_token_logps.detach().squeeze(1)]

    @staticmethod
    def backward(ctx, grad_output, *unused):
        """Liger's, without its `if grad_output != 1.0`, which waits for the GPU, and without a second head-sized gradient."""
        grad_hidden, grad_weight, grad_bias = (grad if grad is None else grad.mul_(grad_output) for grad in ctx.saved_tensors)
        return (grad_hidden, grad_weight, None, None, None, grad_bias, *[None] * (_INPUTS - 6))


def liger_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    old_per_token_logps: torch.Tensor,
    advantages: torch.Tensor,
    denominator: torch.Tensor | float,
    epsilon_low: float,
    epsilon_high: float,
    delta: float,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`loss.policy_loss` summed over N tokens and divided by `denominator`, without logits.

    Args:
        hidden: `(N, H)` last hidden states; weight `(V, H)`, bias `(V,)` of the LM head; targets `(N,)` the sampled tokens.
        old_per_token_logps, advantages: `(N,)`.
        denominator: see `loss.denominator`; at least 1. A tensor on the device spares a copy to the GPU, and the wait for it.

    Returns:
        Scalar loss, and the `(N,)` log-probabilities without gradient.
    """
    if not len(targets):  # connected to the model, so that backward finds what it expects on every rank
        return hidden.sum() * 0.0 + weight.sum() * 0.0, old_per_token_logps
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    arguments = _SIGNATURE.bind(
        None,  # ctx
        _input=hidden[:, None],  # every token is a row of its own: advantages are per row
        weight=weight,
        selected_token_ids=targets[:, None],
        attention_mask=torch.ones_like(targets[:, None], dtype=torch.float32),
        advantages=advantages,
        bias=bias,
        old_per_token_logps=old_per_token_logps[:, None],
        beta=0.0,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        delta=delta,
        loss_type="dapo",  # sum over tokens / num_items_in_batch
        temperature=temperature,
        compiled=False,
        use_ref_model=False,
        chunk_size=_ONE_CHUNK,
        num_items_in_batch=denominator * world_size,  # Liger divides it by the number of ranks
    )
    arguments.apply_defaults()
    with _tf32(hidden.dtype != torch.float32):
        loss, (logps,) = _PolicyLoss.apply(*arguments.args[1:])
    return loss, logps


@contextmanager
def _tf32(wanted: bool):
    """TF32 for the float32 products of Liger's gradients, several times slower without, and for nothing else in the process.

    Rotary angles are a float32 product too, position x frequency, and TF32's 10 bits hold positions up to 2,048 only. A run in
    float32 does not want TF32 here either.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if wanted:
        matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def check_liger_support(model: PreTrainedModel, cast_lm_head_to_fp32: bool = False) -> None:
    """Liger's kernel knows a plain linear head only.

    Raises:
        ConfigError: naming what the model has, and the switch.
    """
    config = model.config.get_text_config()
    found = [
        f"{k}={getattr(config, k)}" for k, plain in _LOGIT_CHANGES.items() if getattr(config, k, None) not in (None, plain)
    ]
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        found.append(f"an LM head of type {type(head).__name__}")
    if cast_lm_head_to_fp32:
        found.append("cast_lm_head_to_fp32=True")
    if found:
        raise ConfigError(
            f"loss_backend='liger' computes plain linear logits, and this model has {', '.join(found)}: its loss would be that "
            "of another model. Use --loss_backend trl, which supports it (adapters on the head: no backend does; take "
            "'lm_head' out of the LoRA target modules)."
        )


def check_dense(model: PreTrainedModel) -> None:
    """Mixture-of-experts models train with an auxiliary loss on their router, which this objective has not.

    Raises:
        ConfigError: if the model is one that returns router logits.
    """
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ConfigError(
            f"{model.config.model_type} asks for a load-balancing loss (output_router_logits=True), and the JustRL objective "
            "has none: the router would train without it. Use a dense model, or set output_router_logits: false in its config."
        )


def add_liger_loss(model: PreTrainedModel, epsilon_low: float, epsilon_high: float, delta: float, temperature: float) -> None:
    """Teach `model` to answer `model(..., liger={...})` with a `LigerOutput`.

    `liger` holds `positions` `(N,)` of the hidden states to score in a row, and `targets`, `old_per_token_logps`, `advantages`
    (each `(N,)`) and `denominator` of `liger_policy_loss`. Without `liger` the forward pass is the one the model had.
    """
    original_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, liger: dict | None = None, **kwargs):
        if liger is None:
            return original_forward(*args, **kwargs)
        outputs = self.base_model(*args, **kwargs, use_cache=False)
        hidden = outputs.last_hidden_state[0].index_select(0, liger["positions"])
        head = self.get_output_embeddings()
        if torch.is_autocast_enabled(hidden.device.type):  # what autocast would do to the head's product, as in scoring
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        values = {name: value for name, value in liger.items() if name != "positions"}
        # ZeRO-3 shards the head: it is gathered for as long as the loss takes. Autocast ends here: it would cut the float32
        # sums of Liger's backward pass to bfloat16
        with torch.autocast(hidden.device.type, enabled=False), maybe_gather_lm_head_ctx(head.weight, head.bias):
            loss, logps = liger_policy_loss(
                hidden,
                head.weight,
                head.bias,
                epsilon_low=epsilon_low,
                epsilon_high=epsilon_high,
                delta=delta,
                temperature=temperature,
                **values,
            )
        return LigerOutput(loss=loss, log_probs=logps)

    model.forward = types.MethodType(forward, model)
