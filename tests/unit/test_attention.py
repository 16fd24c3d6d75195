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

from justrl_trl.attention import PACKED_SDPA, check_attention, describe_attention, packed_arguments, use_packed_attention
from justrl_trl.packing import PackedRow, Sequence, pack

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
def test_every_other_attention_is_replaced(other):
    model = with_attention(other)
    use_packed_attention(model)
    assert model.config._attn_implementation == PACKED_SDPA


@pytest.mark.parametrize("implementation", [None, "sdpa", "eager"])
def test_attention_that_is_everywhere_passes_the_check(implementation):
    check_attention(implementation)


@pytest.mark.parametrize("flash", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_flash_attention_without_a_gpu_is_refused(monkeypatch, flash):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"{flash}.*no GPU.*--attn_implementation sdpa"):
        check_attention(flash)


def test_flash_attention_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'flash_attn' is not installed.*--attn_implementation sdpa"):
        check_attention("flash_attention_2")
    assert "flash-attn is not installed" in describe_attention("sdpa")
