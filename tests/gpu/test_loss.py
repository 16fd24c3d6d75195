"""Head and loss on a GPU: Liger's kernel equals plain logits in float32 and bfloat16, in little memory at V = 151,936."""

from types import SimpleNamespace

import pytest
import torch

from justrl_trl.policy.fused_loss import liger_policy_loss
from justrl_trl.policy.loss import policy_loss

from .conftest import GPU, error

CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28, "delta": 10.0}
TOKENS, HIDDEN, VOCABULARY = (2048, 1536, 151_936) if GPU else (64, 32, 997)


def inputs(device: torch.device, dtype: torch.dtype, tokens: int = TOKENS) -> SimpleNamespace:
    """A head, tokens and old log-probabilities that reach both clips; drawn on the CPU, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) * HIDDEN**-0.5
    targets = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    shift, advantages = torch.randn(tokens, generator=generator) * 0.5, torch.randn(tokens, generator=generator)
    case = SimpleNamespace(x=x.to(device, dtype), weight=weight.to(device, dtype), targets=targets.to(device))
    logits = case.x.float() @ case.weight.float().T
    case.old = logits.log_softmax(-1).gather(1, case.targets[:, None])[:, 0] + shift.to(device)
    case.advantages = advantages.to(device)
    return case


def plain(case: SimpleNamespace, dtype: torch.dtype) -> tuple:
    """The readable twin: all logits, then `policy_loss`; in `dtype`."""
    x, weight = (t.to(dtype).detach().requires_grad_() for t in (case.x, case.weight))
    logps = (x @ weight.T).float().log_softmax(-1).gather(1, case.targets[:, None])[:, 0]
    loss = policy_loss(logps, case.old, case.advantages, torch.ones_like(logps), **CLIP).sum() / len(logps)
    loss.backward()
    return loss.detach(), logps.detach(), x.grad, weight.grad


def fused(case: SimpleNamespace) -> tuple:
    x, weight = (t.detach().requires_grad_() for t in (case.x, case.weight))
    denominator = torch.full((), float(len(case.targets)), device=case.x.device)
    rest = {"old_per_token_logps": case.old, "advantages": case.advantages, "denominator": denominator}
    loss, logps = liger_policy_loss(x, weight, None, case.targets, **rest, **CLIP)
    loss.backward()
    return loss.detach(), logps, x.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_liger_equals_plain_logits_in_loss_logps_and_gradients(device, figures, dtype):
    case = inputs(device, dtype)
    exact, got = plain(case, torch.float32), fused(case)
    # a mean of terms of both signs, each about as large as an advantage: off by so much of them, not of what is left over
    loss = float((got[0] - exact[0]).abs() / case.advantages.abs().mean())
    off = [error(one, other) for one, other in zip(got[1:], exact[1:], strict=True)]
    twin = [error(one, other) for one, other in zip(plain(case, dtype)[1:], exact[1:], strict=True)]
    names = ("logps", "grad_hidden", "grad_head")
    figures(loss=loss, **dict(zip(names, off, strict=True)))
    assert loss <= (1e-5 if dtype == torch.float32 else 5e-3)
    for name, one, other in zip(names, off, twin, strict=True):
        # in bfloat16 no further from float32 than plain logits in bfloat16; Liger's TF32 has three bits more than that
        assert one <= (1e-4 if dtype == torch.float32 else max(2 * other, 5e-3)), (name, one, other)


def test_tf32_is_off_when_the_loss_has_been_computed(device):
    before = torch.backends.cuda.matmul.fp32_precision
    fused(inputs(device, torch.bfloat16, tokens=16))
    assert torch.backends.cuda.matmul.fp32_precision == before != "tf32"


def peak_gib(step) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def test_peak_memory_of_head_and_loss_at_the_papers_vocabulary(device, figures):
    case = inputs(device, torch.bfloat16)
    if not GPU:
        plain(case, torch.bfloat16), fused(case)  # a CPU has no such counter
        return
    liger, logits = peak_gib(lambda: fused(case)), peak_gib(lambda: plain(case, torch.bfloat16))
    figures(liger_gib=liger, plain_logits_gib=logits, tokens=TOKENS)
    long = inputs(device, torch.bfloat16, tokens=16384) if torch.cuda.mem_get_info()[0] > 40 * 2**30 else None
    if long is not None:
        figures(liger_gib_at_16384=peak_gib(lambda: fused(long)))
    assert liger < logits / 2
