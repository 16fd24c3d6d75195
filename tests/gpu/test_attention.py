"""The varlen kernel, SDPA and a padded pass are one attention: outputs and gradients, grouped queries, bfloat16."""

import pytest
import torch
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

from justrl_trl.policy.attention import PACKED_SDPA, PACKED_VARLEN, packed_arguments
from justrl_trl.policy.packing import Sequence, pack

from .conftest import GPU, error

# with a GPU: a token alone, odd lengths, a whole sequence of the paper; the CPU has no varlen kernel, SDPA stands in for it
LENGTHS = [1, 17, 1024, 333, 16384, 2] if GPU else [1, 17, 64, 33, 2]
KERNEL = PACKED_VARLEN if GPU else PACKED_SDPA
HEADS = [(12, 2), (8, 8), (16, 1)]  # queries, keys and values; the first are Qwen2.5-1.5B's


def attention(name: str, tensors: tuple, lengths: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output `(T, heads, D)` and gradients of query, key and value under a fixed gradient of the output.

    In float32 key and value heads are repeated first: for grouped queries SDPA has no float32 kernel on a GPU but the one that
    holds heads x T x T scores, tens of GiB here.
    """
    query, key, value = leaves = [t.clone().requires_grad_() for t in tensors]
    groups = query.shape[1] // key.shape[1]
    if query.dtype == torch.float32:
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int().to(query.device)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    extra = {"packed_lengths": lengths, "boundaries": boundaries, "longest": max(lengths), "scaling": query.shape[-1] ** -0.5}
    out, _ = AttentionInterface()[name](module, query, key, value, None, **extra)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    return out[0].detach(), [t.grad for t in leaves]


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernel_and_sdpa_are_as_far_from_float32_as_each_other(device, figures, heads, kv_heads, head_dim):
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    shapes = [(1, heads, total, head_dim), (1, kv_heads, total, head_dim), (1, kv_heads, total, head_dim)]
    tensors = tuple(torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes)
    exact, exact_gradients = attention(PACKED_SDPA, tuple(t.float() for t in tensors), LENGTHS)
    got, got_gradients = attention(KERNEL, tensors, LENGTHS)
    twin, twin_gradients = attention(PACKED_SDPA, tensors, LENGTHS)
    rows = zip([got, *got_gradients], [twin, *twin_gradients], [exact, *exact_gradients], strict=True)
    off = [(error(one, reference), error(other, reference)) for one, other, reference in rows]
    figures(largest_error=max(mine for mine, _ in off), of_sdpa=max(theirs for _, theirs in off))
    for name, (mine, theirs) in zip(("output", "query", "key", "value"), off, strict=True):
        assert mine <= max(2 * theirs, 1e-6) and mine < 0.02, name


def model(implementation: str, device: torch.device, dtype: torch.dtype) -> Qwen2ForCausalLM:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512, "head_dim": 64}
    config = Qwen2Config(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32768, **sizes)
    torch.manual_seed(0)
    made = Qwen2ForCausalLM(config)
    made.set_attn_implementation(implementation)
    return made.to(device, dtype).train()


def test_a_packed_row_equals_a_padded_batch_in_logits_and_gradients(device, figures):
    lengths = [700, 33, 1500, 5] if GPU else [40, 33, 5]
    generator = torch.Generator().manual_seed(2)
    sequences = [Sequence(torch.randint(0, 512, (length,), generator=generator), prompt_length=1) for length in lengths]
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence.ids.to(device), 1

    def packed(implementation: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        made, row = model(implementation, device, dtype), pack(sequences, device)
        extra = packed_arguments(made, row)
        logits = made(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False, **extra).logits[0]
        logits.float().square().mean().backward()
        return logits, torch.cat([p.grad.flatten().float() for p in made.parameters()])

    def padded(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        made = model("sdpa", device, dtype)
        logits = made(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.float().square().mean().backward()
        return logits, torch.cat([p.grad.flatten().float() for p in made.parameters()])

    exact, exact_gradient = padded(torch.float32)
    assert error(packed(PACKED_SDPA, torch.float32)[0], exact) < 1e-5
    got, gradient = packed(KERNEL, torch.bfloat16)
    twin, twin_gradient = padded(torch.bfloat16)
    figures(logits=error(got, exact), logits_of_padded=error(twin, exact), gradient=error(gradient, exact_gradient))
    assert error(got, exact) <= max(2 * error(twin, exact), 1e-5)
    assert error(gradient, exact_gradient) <= max(2 * error(twin_gradient, exact_gradient), 1e-5)


@pytest.mark.parametrize(("name", "dtype"), [(KERNEL, torch.bfloat16), (PACKED_SDPA, torch.float32)])
def test_a_long_row_takes_no_memory_for_scores(device, figures, name, dtype):
    """16k tokens: a T x T mask of bytes would be 256 MiB, scores in bfloat16 of 12 heads 6 GiB, in float32 12."""
    lengths = [16384, 16384] if GPU else [128, 128]
    shapes = [(1, 12, sum(lengths), 128), (1, 2, sum(lengths), 128), (1, 2, sum(lengths), 128)]
    tensors = tuple(torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if GPU else 0
    attention(name, tensors, lengths)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if GPU else 0.0
    figures(peak_mib=peak)
    assert peak < 3000
