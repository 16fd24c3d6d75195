"""Liger's kernel and the readable loss are one function, values and gradients; what Liger cannot compute is refused."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from justrl_trl.policy import fused_loss
from justrl_trl.policy.attention import packed_arguments, use_packed_attention
from justrl_trl.policy.fused_loss import add_liger_loss, check_dense, check_liger_support, liger_policy_loss
from justrl_trl.policy.loss import policy_loss
from justrl_trl.policy.packing import Sequence, pack
from tests.side_by_side import small_model

CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28, "delta": 10.0}


def inputs(tokens: int = 50, hidden: int = 16, vocabulary: int = 97, bias: bool = False) -> SimpleNamespace:
    """A head, tokens and old log-probabilities far enough off that every branch of the clip is met."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator)
    weight = torch.randn(vocabulary, hidden, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    logps = torch.log_softmax(x @ weight.T, dim=-1)[torch.arange(tokens), targets]
    old = logps + torch.randn(tokens, generator=generator) * 1.5
    advantages = torch.randn(tokens, generator=generator)
    b = torch.randn(vocabulary, generator=generator) if bias else None
    return SimpleNamespace(x=x, weight=weight, bias=b, targets=targets, old=old, advantages=advantages)


def plain(case: SimpleNamespace, denominator: float, temperature: float):
    """The readable twin: all logits, then `policy_loss`."""
    leaves = [t.clone().requires_grad_() for t in (case.x, case.weight, case.bias) if t is not None]
    logits = torch.nn.functional.linear(*leaves) / temperature
    logps = torch.log_softmax(logits, dim=-1).gather(1, case.targets[:, None])[:, 0]
    loss = policy_loss(logps, case.old, case.advantages, torch.ones_like(logps), **CLIP).sum() / denominator
    loss.backward()
    return loss.detach(), logps.detach(), [leaf.grad for leaf in leaves]


def fused(case: SimpleNamespace, denominator: float, temperature: float, scale: float = 1.0):
    leaves = [t.clone().requires_grad_() for t in (case.x, case.weight, case.bias) if t is not None]
    loss, logps = liger_policy_loss(
        leaves[0],
        leaves[1],
        leaves[2] if case.bias is not None else None,
        case.targets,
        old_per_token_logps=case.old,
        advantages=case.advantages,
        denominator=denominator,
        temperature=temperature,
        **CLIP,
    )
    (loss * scale).backward()
    return loss.detach(), logps, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("denominator", "temperature"), [(50.0, 1.0), (123.5, 1.0), (7.0, 0.7)])
def test_liger_equals_plain_torch_in_loss_logps_and_gradients(bias, denominator, temperature):
    case = inputs(bias=bias)
    loss, logps, gradients = plain(case, denominator, temperature)
    got_loss, got_logps, got_gradients = fused(case, denominator, temperature)
    assert torch.allclose(got_loss, loss, rtol=1e-5)
    assert torch.allclose(got_logps, logps, rtol=1e-5, atol=1e-5) and not got_logps.requires_grad
    for got, expected in zip(got_gradients, gradients, strict=True):
        assert float((got - expected).norm() / expected.norm()) < 1e-5


def test_the_inputs_meet_every_branch_of_the_clip():
    case = inputs()
    ratio = (plain(case, 1.0, 1.0)[1] - case.old).exp()
    good = case.advantages > 0
    for branch in ((ratio < 0.8) & ~good, (ratio > 1.28) & good, (ratio > 10) & ~good, (ratio > 0.8) & (ratio < 1.28)):
        assert branch.any()


def test_more_tokens_than_a_tile_and_more_words_than_a_tile():
    case = inputs(tokens=2050, hidden=8, vocabulary=4100)  # Liger tiles 2,048 x 4,096
    loss, logps, gradients = plain(case, 2050.0, 1.0)
    got_loss, got_logps, got_gradients = fused(case, 2050.0, 1.0)
    assert torch.allclose(got_loss, loss, rtol=1e-5) and torch.allclose(got_logps, logps, rtol=1e-4, atol=1e-4)
    for got, expected in zip(got_gradients, gradients, strict=True):
        assert float((got - expected).norm() / expected.norm()) < 1e-5


def test_a_scaled_loss_has_scaled_gradients():
    once, thrice = fused(inputs(), 50.0, 1.0)[2], fused(inputs(), 50.0, 1.0, scale=3.0)[2]
    for one, three in zip(once, thrice, strict=True):
        assert torch.allclose(3 * one, three)


def test_no_tokens_are_a_connected_zero():
    case = inputs(tokens=0)
    loss, logps, gradients = fused(case, 1.0, 1.0)
    assert loss == 0 and len(logps) == 0
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_a_frozen_head_gets_no_gradient():
    case = inputs()
    x = case.x.clone().requires_grad_()
    loss, _ = liger_policy_loss(
        x, case.weight, None, case.targets, old_per_token_logps=case.old, advantages=case.advantages, denominator=50.0, **CLIP
    )
    loss.backward()
    assert torch.allclose(x.grad, plain(case, 50.0, 1.0)[2][0], atol=1e-6) and case.weight.grad is None


def test_without_liger_the_model_is_as_it_was():
    model, other = small_model(False, 97), small_model(False, 97)
    add_liger_loss(model, 0.2, 0.28, 10.0, 1.0)
    ids = torch.randint(0, 97, (2, 9))
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
    assert torch.equal(model(ids, labels=ids).loss, other(ids, labels=ids).loss)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)


@pytest.mark.parametrize(
    ("name", "value"),
    [("final_logit_softcapping", 30.0), ("logit_scale", 0.25), ("logits_scaling", 8.0), ("lm_head_multiplier", 0.1)],
)
def test_logits_that_liger_would_get_wrong_are_refused_with_the_switch(name, value):
    model = small_model(False, 97)
    setattr(model.config, name, value)
    with pytest.raises(ValueError, match=rf"{name}={value}.*--loss_backend trl"):
        check_liger_support(model)


def test_scales_that_change_nothing_are_fine():
    model = small_model(False, 97)
    model.config.logit_scale, model.config.final_logit_softcapping = 1.0, None
    check_liger_support(model)


def test_adapters_on_the_head_are_refused():
    model = get_peft_model(small_model(False, 97), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="LM head of type Linear.*take 'lm_head' out"):
        check_liger_support(model.get_base_model())


def test_a_float32_head_is_refused_with_the_switch():
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32=True.*--loss_backend trl"):
        check_liger_support(small_model(False, 97), cast_lm_head_to_fp32=True)


def test_under_autocast_the_head_computes_in_the_precision_of_the_scoring_pass():
    """Otherwise the ratio of an unchanged policy is not 1. TRL's head is what scores."""
    model = small_model(False, 97).eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    add_liger_loss(model, 0.2, 0.28, 10.0, 1.0)
    use_packed_attention(model)
    ids = torch.randint(0, 97, (60,), generator=torch.Generator().manual_seed(0))
    row = pack([Sequence(ids[:25], 5), Sequence(ids[25:], 9)], torch.device("cpu"))
    arguments = {"input_ids": row.input_ids, "position_ids": row.position_ids, **packed_arguments(model, row)}
    with torch.autocast("cpu", torch.bfloat16):
        old = model(**arguments, labels=row.labels, fused_lm_head=True).log_probs[0, row.scored].detach()
        liger = {"positions": row.scored, "targets": row.targets, "old_per_token_logps": old, "denominator": float(len(old))}
        logps = model(**arguments, liger={**liger, "advantages": torch.ones_like(old)}).log_probs
    assert (logps - old).abs().max() < 1e-4


def test_a_mixture_of_experts_with_a_router_loss_is_refused():
    model = small_model(False, 97)
    check_dense(model)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits=True.*Use a dense model"):
        check_dense(model)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, "tf32"), (torch.float32, None)])
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_tf32_is_on_inside_ligers_kernel_only(monkeypatch, dtype, expected, fails):
    """Rotary angles are float32 products: exact under TF32 up to position 2,048 only."""
    matmul, seen = torch.backends.cuda.matmul, []
    before = matmul.fp32_precision
    assert before != "tf32"
    kernel = fused_loss.LigerFusedLinearGRPOFunction.ppo_loss_fn

    def watched(*args, **kwargs):
        seen.append(matmul.fp32_precision)
        if fails:
            raise RuntimeError("out of memory")
        return kernel(*args, **kwargs)

    monkeypatch.setattr(fused_loss.LigerFusedLinearGRPOFunction, "ppo_loss_fn", watched)
    case = inputs()
    case.x, case.weight = case.x.to(dtype), case.weight.to(dtype)
    with pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext():
        fused(case, denominator=50.0, temperature=1.0)
    assert set(seen) == {expected or before} and matmul.fp32_precision == before
