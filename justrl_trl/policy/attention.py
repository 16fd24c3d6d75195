"""Attention that stays inside each sequence of a packed row, on every machine.

GPU and bfloat16: FlashAttention's varlen kernel as PyTorch ships it, told the boundaries of the row. Elsewhere: PyTorch's SDPA,
sequence by sequence, so a row of T tokens costs the sum of the squared lengths and never a T x T mask. SDPA is no choice for a
Hopper GPU: it prefers cuDNN there, which plans anew for every shape and stride that it meets, in seconds per rollout step, and
keeps every plan.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable

import torch
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from justrl_trl.errors import ConfigError
from justrl_trl.policy.packing import PackedRow

PACKED_SDPA = "justrl_packed_sdpa"
PACKED_VARLEN = "justrl_packed_varlen"
_ASKED = ("auto", "varlen", "sdpa")  # what a recipe may say besides FlashAttention packages
_CAUSAL = (-1, 0)  # window: every token on the left, none on the right


def packed_sdpa(module, query, key, value, attention_mask, packed_lengths: list[int] | None = None, **kwargs):
    """Causal SDPA within each of `packed_lengths`; without them, transformers' own SDPA (evaluation, probes).

    Args:
        query, key, value: `(1, heads, T, head_dim)`; key and value may have fewer heads.
        packed_lengths: tokens of each sequence in the row; they sum to T.

    Returns:
        `(1, T, heads, head_dim)` and None, as transformers expects.
    """
    if packed_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    attend = _whole_head_sdpa if query.is_cuda and query.dtype == torch.float32 else sdpa_attention_forward
    pieces = [
        attend(module, q, k, v, None, **kwargs)[0]
        for q, k, v in zip(*(t.split(packed_lengths, dim=2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(pieces, dim=1), None


def _whole_head_sdpa(module, query, key, value, attention_mask, dropout: float = 0.0, scaling: float | None = None, **kwargs):
    """Causal SDPA with key and value heads repeated. In float32 on a GPU, SDPA has no fused kernel for grouped queries, and the
    one that it has holds heads x T x T scores."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, None, dropout, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def packed_varlen(
    module,
    query,
    key,
    value,
    attention_mask,
    packed_lengths: list[int] | None = None,
    boundaries: torch.Tensor | None = None,
    longest: int | None = None,
    scaling: float | None = None,
    **kwargs,
):
    """As `packed_sdpa`, in one call of `torch.nn.attention.varlen.varlen_attn` for the whole row.

    Args:
        boundaries, longest: of the row's sequences, see `packing.PackedRow`; needed where `packed_lengths` is given.
        scaling: of the scores; default: 1 / sqrt(head_dim).
    """
    if packed_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # The kernel is not on autocast's list, and rotary embeddings leave query and key in float32
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    q, k, v = (t[0].transpose(0, 1).to(dtype) for t in (query, key, value))  # (T, heads, head_dim)
    out = _varlen()(q, k, v, boundaries, boundaries, longest, longest, scale=scaling, window_size=_CAUSAL)
    return out[None], None


@functools.cache
def _varlen() -> Callable[..., torch.Tensor]:
    """PyTorch's varlen attention with grouped queries; where it does not know them (2.11), key and value heads are repeated."""
    kernel = varlen.varlen_attn
    if "enable_gqa" in inspect.signature(kernel).parameters:
        return functools.partial(kernel, enable_gqa=True)

    def repeated(q, k, v, *args, **kwargs):
        groups = q.shape[1] // k.shape[1]
        return kernel(q, *(t.repeat_interleave(groups, dim=1) for t in (k, v)), *args, **kwargs)

    return repeated


for _name, _function in {PACKED_SDPA: packed_sdpa, PACKED_VARLEN: packed_varlen}.items():
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)


def choose_attention(asked: str | None, half_precision: bool) -> str:
    """The name under which transformers finds the attention of this run on this machine.

    Args:
        asked: `attn_implementation` of the recipe: `auto` (or None), `varlen`, `sdpa`, or a FlashAttention package.
        half_precision: the model computes in bfloat16 or float16.

    Raises:
        ConfigError: this machine or this precision cannot run what is asked for, or it is unknown. Nothing else is taken
            instead: transformers would look for a kernel on the Hub.
    """
    if _is_flash(asked):
        _check_flash(asked)
        return asked
    why_not = _why_not_varlen(half_precision)
    if asked in (None, "auto"):
        return PACKED_SDPA if why_not else PACKED_VARLEN
    if asked == "varlen":
        if why_not:
            raise ConfigError(f"attn_implementation='varlen': {why_not}. Use --attn_implementation auto, which is SDPA here.")
        return PACKED_VARLEN
    if asked == "sdpa":
        return PACKED_SDPA
    raise ConfigError(
        f"attn_implementation={asked!r} does not know packed rows: it would need a mask of T x T for a row of T tokens. Use "
        f"one of {', '.join(_ASKED)}, flash_attention_2, flash_attention_3."
    )


def describe_attention(name: str, half_precision: bool) -> str:
    """What the plan says about the attention that `choose_attention` chose."""
    if _is_flash(name):
        return f"{name}, whole rows at once"
    if name == PACKED_VARLEN:
        return f"FlashAttention's varlen kernel of torch {torch.__version__}, whole rows at once"
    return f"PyTorch SDPA, sequence by sequence ({_why_not_varlen(half_precision) or 'as the recipe asks'})"


def _why_not_varlen(half_precision: bool) -> str | None:
    if not torch.cuda.is_available():
        return "this machine has no GPU, which the varlen kernel needs"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the varlen kernel needs a GPU of compute capability 8.0, and this one has {major}.{minor}"
    return None if half_precision else "the varlen kernel knows bfloat16 and float16, and this run computes in float32"


def _is_flash(implementation: str | None) -> bool:
    return (implementation or "").startswith(("flash_attention", "kernels-community"))


def _check_flash(implementation: str) -> None:
    known = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface", "flash_attention_4": "flash_attn"}
    package = "kernels" if "/" in implementation else known.get(implementation, "flash_attn")
    reason = None
    if not torch.cuda.is_available():
        reason = "this machine has no GPU, and FlashAttention runs on nothing else"
    elif importlib.util.find_spec(package) is None:
        reason = f"the package {package!r} is not installed"
    if reason:
        raise ConfigError(
            f"attn_implementation={implementation!r}: {reason}. Install it, or use --attn_implementation auto: PyTorch's own "
            "kernels, without padding and without a T x T mask."
        )


def use_packed_attention(model: PreTrainedModel, half_precision: bool = False) -> None:
    """Switch `model` to an attention that understands packed rows, unless it has one.

    Raises:
        ConfigError: if it has the varlen kernel and this machine or precision cannot run it.
    """
    name = model.config._attn_implementation
    if name == PACKED_VARLEN:
        choose_attention("varlen", half_precision)
    elif name != PACKED_SDPA and not _is_flash(name):
        model.set_attn_implementation(choose_attention("auto", half_precision))


def packed_arguments(model: PreTrainedModel, row: PackedRow) -> dict:
    """Keyword arguments of `model(...)` that tell its attention where sequences of a packed row begin and end."""
    longest = max(row.lengths)
    if _is_flash(model.config._attn_implementation):
        return {
            "attention_mask": None,
            "cu_seq_lens_q": row.boundaries,
            "cu_seq_lens_k": row.boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    _check_layers(model)
    # transformers leaves a 4-D mask as it is instead of building T x T; packed attention does not look at it
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.input_ids.device)
    return {"attention_mask": mask, "packed_lengths": row.lengths, "boundaries": row.boundaries, "longest": longest}


def _check_layers(model: PreTrainedModel) -> None:
    """Packed rows without a FlashAttention package: full attention only, and no dropout in it."""
    config = model.config
    windowed = getattr(config, "sliding_window", None) and not hasattr(config, "layer_types")
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if windowed else "full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigError(
            f"The model has attention layers of kinds {sorted(kinds)}; packed rows without FlashAttention support full "
            "attention only. Install flash-attn and set attn_implementation: flash_attention_2."
        )
    if config._attn_implementation == PACKED_VARLEN and getattr(config, "attention_dropout", 0.0):
        raise ConfigError(
            f"The model's config has attention_dropout={config.attention_dropout}, and the varlen kernel has no dropout. The "
            "reference trains without: set it to 0.0 in the model's config.json, or use --attn_implementation sdpa."
        )
