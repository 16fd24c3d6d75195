"""In a packed row every sequence is computed as if it were alone: logits, gradients, and no leak from its neighbours."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from justrl_trl.policy import attention
from justrl_trl.policy.attention import (
    PACKED_SDPA,
    PACKED_VARLEN,
    choose_attention,
    describe_attention,
    packed_arguments,
    use_packed_attention,
)
from justrl_trl.policy.packing import PackedRow, Sequence, pack

CPU = torch.device("cpu")
VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # far from the identity, so that attention matters
}
MODELS = {
    "Qwen2": lambda **extra: Qwen2ForCausalLM(Qwen2Config(**SIZES, **extra)),
    "Llama": lambda **extra: LlamaForCausalLM(LlamaConfig(**SIZES, **extra)),
}


def tiny(name: str, **extra) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name](**extra).train()


def sequences(seed: int = 0, lengths: tuple[int, ...] = (17, 1, 30, 5, 2)) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]
    return [Sequence(tokens, prompt_length=max(1, len(tokens) // 3)) for tokens in ids]


def row_of(*lengths: int) -> PackedRow:
    return pack(sequences(lengths=lengths), CPU)


def packed_logits(model: PreTrainedModel, row: PackedRow) -> torch.Tensor:
    extra = packed_arguments(model, row)
    return model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False, **extra).logits[0]


def loss(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Summed negative log-likelihood of the response."""
    first = sequence.prompt_length
    return torch.nn.functional.cross_entropy(logits[first - 1 : -1], sequence.ids[first:], reduction="sum")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_row_equals_each_sequence_alone_in_logits_and_gradients(name, checkpointing):
    alone, packed = tiny(name), tiny(name)
    use_packed_attention(packed)
    if checkpointing:
        packed.gradient_checkpointing_enable()
    parts = sequences()
    row = pack(parts, CPU)
    pieces = packed_logits(packed, row).split(row.lengths)
    sum(loss(piece, part) for piece, part in zip(pieces, parts, strict=True)).backward()
    for piece, part in zip(pieces, parts, strict=True):
        single = alone(input_ids=part.ids[None], use_cache=False).logits[0]
        assert torch.allclose(piece, single, rtol=1e-5, atol=1e-5)
        loss(single, part).backward()
    for (parameter, one), other in zip(alone.named_parameters(), packed.parameters(), strict=True):
        # 1e-5 of the largest entry: the two sum in another order
        assert (one.grad - other.grad).abs().max() <= 1e-5 * one.grad.abs().max() + 1e-7, parameter
        assert one.grad.abs().max() > 0, parameter


@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_does_not_see_its_neighbours(name):
    model = tiny(name).eval()
    use_packed_attention(model)
    parts = sequences()
    others = [*sequences(seed=1)[:2], parts[2], *sequences(seed=1)[3:]]  # everything but the third one is new
    with torch.no_grad():
        first = packed_logits(model, pack(parts, CPU)).split([len(s) for s in parts])
        second = packed_logits(model, pack(others, CPU)).split([len(s) for s in others])
    assert torch.equal(first[2], second[2])
    assert not torch.allclose(first[0], second[0])


@pytest.mark.parametrize("name", MODELS)
def test_without_packed_lengths_the_switched_model_computes_as_before(name):
    plain, switched = tiny(name).eval(), tiny(name).eval()
    use_packed_attention(switched)
    assert switched.config._attn_implementation == PACKED_SDPA
    ids = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # left padding, as in generation
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask).logits
        got = switched(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(got[mask.bool()], expected[mask.bool()], atol=1e-6)


def test_lengths_that_are_not_the_row_are_an_error():
    model = tiny("Qwen2")
    use_packed_attention(model)
    row = pack(sequences(), CPU)
    row.lengths[0] += 1
    with pytest.raises(RuntimeError, match="split"):
        packed_logits(model, row)


def test_sliding_window_layers_are_refused_with_the_remedy():
    model = tiny("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    use_packed_attention(model)
    with pytest.raises(ValueError, match=r"\['full_attention', 'sliding_attention'\].*Install flash-attn"):
        packed_arguments(model, row_of(3, 4))


def test_a_sliding_window_without_layer_types_is_refused_too():
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))
    use_packed_attention(model)
    with pytest.raises(ValueError, match="Install flash-attn"):
        packed_arguments(model, row_of(30))


def with_attention(implementation: str):
    """A model as far as the two functions look at it; this machine has no FlashAttention to load."""

    class Fake:
        config = SimpleNamespace(_attn_implementation=implementation)

        def set_attn_implementation(self, name: str) -> None:
            self.config._attn_implementation = name

    return Fake()


@pytest.mark.parametrize("flash", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_flash_attention_is_kept_and_told_the_boundaries(flash):
    model = with_attention(flash)
    use_packed_attention(model)
    assert model.config._attn_implementation == flash
    got = packed_arguments(model, row_of(3, 1, 2))
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        boundaries = got.pop(name)
        assert boundaries.tolist() == [0, 3, 4, 6] and boundaries.dtype == torch.int32
    assert got == {"attention_mask": None, "max_length_q": 3, "max_length_k": 3}


@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_a_model_without_packed_attention_gets_that_of_the_machine(monkeypatch, other):
    for capability, half, expected in [(None, True, PACKED_SDPA), ((9, 0), False, PACKED_SDPA), ((9, 0), True, PACKED_VARLEN)]:
        on_gpu(monkeypatch, capability)
        model = with_attention(other)
        use_packed_attention(model, half)
        assert model.config._attn_implementation == expected


def test_a_packed_attention_that_a_model_has_is_kept(monkeypatch):
    on_gpu(monkeypatch, (9, 0))
    for name in (PACKED_SDPA, PACKED_VARLEN):
        model = with_attention(name)
        use_packed_attention(model, half_precision=True)
        assert model.config._attn_implementation == name
    with pytest.raises(ValueError, match="computes in float32"):
        use_packed_attention(with_attention(PACKED_VARLEN), half_precision=False)


def on_gpu(monkeypatch, capability: tuple[int, int] | None) -> None:
    """From here on this machine has a GPU of that compute capability, as far as torch says; None: no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


GPU_OR_NOT = [  # compute capability, half precision, what `auto` takes, why not varlen
    (None, False, PACKED_SDPA, "no GPU"),
    (None, True, PACKED_SDPA, "no GPU"),
    ((7, 5), True, PACKED_SDPA, "needs a GPU of compute capability 8.0, and this one has 7.5"),
    ((8, 0), True, PACKED_VARLEN, None),
    ((9, 0), True, PACKED_VARLEN, None),
    ((10, 0), True, PACKED_VARLEN, None),
    ((9, 0), False, PACKED_SDPA, "computes in float32"),
]


@pytest.mark.parametrize(("capability", "half", "expected", "why_not"), GPU_OR_NOT)
def test_auto_takes_varlen_where_it_runs_and_says_why_not(monkeypatch, capability, half, expected, why_not):
    on_gpu(monkeypatch, capability)
    assert choose_attention("auto", half) == choose_attention(None, half) == expected
    told = describe_attention(expected, half)
    assert ("varlen kernel of torch" if why_not is None else why_not) in told
    if why_not is None:
        assert choose_attention("varlen", half) == PACKED_VARLEN
    else:
        with pytest.raises(ValueError, match=f"'varlen'.*{why_not}.*--attn_implementation auto"):
            choose_attention("varlen", half)


def test_sdpa_is_taken_where_the_recipe_asks_for_it(monkeypatch):
    on_gpu(monkeypatch, (9, 0))
    assert choose_attention("sdpa", True) == PACKED_SDPA
    assert "as the recipe asks" in describe_attention(PACKED_SDPA, True)


@pytest.mark.parametrize("unknown", ["eager", "flex_attention", "Varlen"])
def test_attention_that_knows_no_packed_rows_is_refused(unknown):
    with pytest.raises(ValueError, match=rf"attn_implementation='{unknown}'.*auto, varlen, sdpa, flash_attention_2"):
        choose_attention(unknown, False)


@pytest.mark.parametrize("flash", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_flash_attention_without_a_gpu_is_refused(monkeypatch, flash):
    on_gpu(monkeypatch, None)
    with pytest.raises(ValueError, match=rf"{flash}.*no GPU.*--attn_implementation auto"):
        choose_attention(flash, True)


def test_flash_attention_without_its_package_is_refused(monkeypatch):
    on_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'flash_attn' is not installed.*--attn_implementation auto"):
        choose_attention("flash_attention_2", True)


def cpu_kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """`varlen_attn` written out for a CPU, float32 too: the real one runs on a GPU only (`tests/gpu`)."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and torch.equal(cu_q, cu_k) and window_size == (-1, 0)
    assert q.ndim == 3 and max_q == max_k == int(cu_q.diff().max()), (max_q, cu_q)
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    assert q.shape == k.shape == v.shape
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(q)
    for begin, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[begin:end], k[begin:end]) * scale
        future = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v[begin:end])
    return out


def without_gqa(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """As torch 2.11 has it."""
    return cpu_kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.fixture(params=[cpu_kernel, without_gqa], ids=["grouped queries", "torch 2.11"])
def varlen_on_cpu(request, monkeypatch):
    monkeypatch.setattr(attention.varlen, "varlen_attn", request.param)
    attention._varlen.cache_clear()
    yield
    attention._varlen.cache_clear()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
@pytest.mark.parametrize("name", MODELS)
def test_varlen_and_sdpa_are_twins_in_logits_and_gradients(varlen_on_cpu, name, checkpointing):
    row, models = pack(sequences(), CPU), []
    for implementation in (PACKED_VARLEN, PACKED_SDPA):
        model = tiny(name)
        model.set_attn_implementation(implementation)
        if checkpointing:
            model.gradient_checkpointing_enable()
        logits = packed_logits(model, row)
        logits.square().sum().backward()
        models.append((logits, model))
    (varlen_logits, varlen_model), (sdpa_logits, sdpa_model) = models
    assert torch.allclose(varlen_logits, sdpa_logits, rtol=1e-5, atol=1e-5)
    for (parameter, one), other in zip(varlen_model.named_parameters(), sdpa_model.parameters(), strict=True):
        assert (one.grad - other.grad).abs().max() <= 1e-5 * other.grad.abs().max() + 1e-6, parameter
        assert other.grad.abs().max() > 0, parameter


def test_repeated_heads_give_what_grouped_queries_give():
    """The way of float32 on a GPU, where SDPA has no fused kernel for grouped queries."""
    generator = torch.Generator().manual_seed(0)
    module = SimpleNamespace(num_key_value_groups=4, is_causal=True)
    results = []
    tensors = [torch.randn(1, heads, 37, 16, generator=generator) for heads in (8, 2, 2)]
    for attend in (attention._whole_head_sdpa, attention.sdpa_attention_forward):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out, _ = attend(module, *leaves, None, scaling=0.3, dropout=0.0)
        out.square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_under_autocast_varlen_gets_half_precision_whatever_rotary_embeddings_leave(monkeypatch):
    seen = []

    def kernel(q, k, v, *args, enable_gqa=False, **kwargs):
        seen.extend((q.dtype, k.dtype, v.dtype))
        return q

    monkeypatch.setattr(attention.varlen, "varlen_attn", kernel)
    attention._varlen.cache_clear()
    model = tiny("Qwen2")
    model.set_attn_implementation(PACKED_VARLEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed_logits(model, row_of(3, 4))
    attention._varlen.cache_clear()
    assert set(seen) == {torch.bfloat16}


def test_a_padded_batch_of_a_varlen_model_is_computed_by_sdpa(varlen_on_cpu):
    plain, switched = tiny("Qwen2").eval(), tiny("Qwen2").eval()
    switched.set_attn_implementation(PACKED_VARLEN)
    ids = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask).logits
        got = switched(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(got[mask.bool()], expected[mask.bool()], atol=1e-6)


def test_dropout_in_attention_is_refused_where_the_kernel_has_none():
    model = tiny("Qwen2", attention_dropout=0.1)
    model.set_attn_implementation(PACKED_VARLEN)
    with pytest.raises(ValueError, match=r"attention_dropout=0.1.*0.0 in the model's config.json"):
        packed_arguments(model, row_of(3, 4))
