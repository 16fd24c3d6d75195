"""Attention that stays inside each sequence of a packed row, on every machine.

GPU: FlashAttention's varlen kernel, told the boundaries explicitly. Elsewhere: PyTorch's SDPA, sequence by sequence, so a row
of T tokens costs the sum of the squared lengths and never a T x T mask.
"""

import importlib.util

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from justrl_trl.packing import PackedRow

PACKED_SDPA = "justrl_packed_sdpa"


def packed_sdpa(module, query, key, value, attention_mask, packed_lengths: list[int] | None = None, **kwargs):
    """Causal SDPA within each of `packed_lengths`; without them, transformers' own SDPA (evaluation, probes).

    Args:
        query, key, value: `(1, heads, T, head_dim)`.
        packed_lengths: tokens of each sequence in the row; they sum to T.

    Returns:
        `(1, T, heads, head_dim)` and None, as transformers expects.
    """
    if packed_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    pieces = [
        sdpa_attention_forward(module, q, k, v, None, **kwargs)[0]
        for q, k, v in zip(*(t.split(packed_lengths, dim=2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(pieces, dim=1), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)


def check_attention(implementation: str | None) -> None:
    """FlashAttention must be installed, and have a GPU to run on, if it is asked for.

    Raises:
        ValueError: otherwise; transformers would look for a kernel on the Hub instead.
    """
    if not _is_flash(implementation):
        return
    known = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface", "flash_attention_4": "flash_attn"}
    package = "kernels" if "/" in implementation else known.get(implementation, "flash_attn")
    reason = None
    if not torch.cuda.is_available():
        reason = "this machine has no GPU, and FlashAttention runs on nothing else"
    elif importlib.util.find_spec(package) is None:
        reason = f"the package {package!r} is not installed"
    if reason:
        raise ValueError(
            f"attn_implementation={implementation!r}: {reason}. Install it, or use --attn_implementation sdpa: PyTorch's own "
            "kernels, sequence by sequence, without padding and without a T x T mask."
        )


def describe_attention(implementation: str | None) -> str:
    """What the plan says about attention."""
    if _is_flash(implementation):
        return f"{implementation}, whole rows at once"
    installed = importlib.util.find_spec("flash_attn") is not None
    why = "" if installed or not torch.cuda.is_available() else " (flash-attn is not installed)"
    return f"PyTorch SDPA, sequence by sequence{why}"


def _is_flash(implementation: str | None) -> bool:
    return (implementation or "").startswith(("flash_attention", "kernels-community"))


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch `model` to an attention that understands packed rows; FlashAttention is left as it is."""
    if not _is_flash(model.config._attn_implementation):
        model.set_attn_implementation(PACKED_SDPA)


def packed_arguments(model: PreTrainedModel, row: PackedRow) -> dict:
    """Keyword arguments of `model(...)` that tell its attention where sequences of a packed row begin and end."""
    if model.config._attn_implementation == PACKED_SDPA:
        windowed = getattr(model.config, "sliding_window", None) and not hasattr(model.config, "layer_types")
        kinds = set(getattr(model.config, "layer_types", None) or ["sliding_attention" if windowed else "full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(
                f"The model has attention layers of kinds {sorted(kinds)}; packed rows without FlashAttention support full "
                "attention only. Install flash-attn and set attn_implementation: flash_attention_2."
            )
        # transformers leaves a 4-D mask as it is instead of building T x T; `packed_sdpa` does not look at it
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.input_ids.device)
        return {"attention_mask": mask, "packed_lengths": row.lengths}
    return {
        "attention_mask": None,
        "cu_seq_lens_q": row.boundaries,
        "cu_seq_lens_k": row.boundaries,
        "max_length_q": max(row.lengths),
        "max_length_k": max(row.lengths),
    }
