"""Metrics are token means over the whole step: the reference's clip fractions, whatever the cut into micro-batches."""

import math

import pytest
import torch

from justrl_trl.training.metrics import STEP_SUMS, reduce_once, scoring_sums, step_metrics, step_sums
from tests.unit.recorded import both_sets, core_rows, tensor

CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28, "delta": 10.0}


@both_sets
def test_clip_fractions_equal_the_reference_on_every_recorded_row(which):
    compared = 0
    for row in core_rows(which, "policy_loss"):
        # on an edge the reference compares two roundings of one number; its fraction is a mean over tokens of the whole row
        if row["grad_at_boundary"]:
            continue
        compared += 1
        inputs, mask = row["inputs"], tensor(row["inputs"]["response_mask"], row)
        advantages = tensor(inputs["advantages"], row)
        sums = step_sums(
            torch.zeros(()),
            tensor(inputs["log_prob"], row),
            tensor(inputs["old_log_prob"], row),
            advantages if advantages.dim() == 2 else advantages[:, None].expand_as(mask),
            mask,
            inputs["cliprange_low"],
            inputs["cliprange_high"],
            inputs["clip_ratio_c"],
        )
        metrics = step_metrics(sums.tolist())
        assert metrics["clip_ratio/region_mean"] == pytest.approx(row["outputs"]["pg_clipfrac"], abs=1e-6), row["id"]
        assert metrics["clip_ratio/dual_mean"] == pytest.approx(row["outputs"]["pg_clipfrac_lower"], abs=1e-6), row["id"]
    assert compared


def by_hand() -> dict:
    """Five response tokens, one of each branch, and a masked one that would count in every sum."""
    ratios = torch.tensor([0.5, 0.5, 2.0, 2.0, 20.0, 50.0])
    return {
        "logps": ratios.log(),
        "old_logps": torch.zeros(6),
        "advantages": torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, -1.0]),
        "mask": torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
    }


def test_each_token_counts_where_a_clip_decides_its_loss():
    sums = dict(zip(STEP_SUMS, step_sums(torch.tensor(0.75), **by_hand(), **CLIP).tolist(), strict=True))
    assert sums["loss"] == 0.75
    assert sums["tokens"] == 5
    assert sums["low"] == 1  # only (0.5, -1): a good token below 0.8 is not clipped
    assert sums["high"] == 1  # only (2, +1)
    assert sums["dual"] == 1  # only (20, -1); the one at 50 is masked
    assert sums["ratio"] == pytest.approx(0.5 + 0.5 + 2 + 2 + 20)
    # k3: r - 1 - log r
    assert sums["approx_kl"] == pytest.approx(20 - math.log(0.5 * 0.5 * 2 * 2 * 20), rel=1e-6)


def test_metrics_are_sums_over_tokens():
    metrics = step_metrics(step_sums(torch.tensor(0.75), **by_hand(), **CLIP).tolist())
    assert metrics == pytest.approx(
        {
            "clip_ratio/low_mean": 0.2,
            "clip_ratio/high_mean": 0.2,
            "clip_ratio/dual_mean": 0.2,
            "clip_ratio/region_mean": 0.4,
            "ratio_mean": 5.0,
            "approx_kl": (20 - math.log(20)) / 5,
            "tokens/trained": 5.0,
        },
        rel=1e-6,
    )


def test_unchanged_policy_has_ratio_1_and_nothing_else():
    logps = -torch.rand(9, generator=torch.Generator().manual_seed(0))
    metrics = step_metrics(step_sums(torch.zeros(()), logps, logps, torch.ones(9), torch.ones(9), **CLIP).tolist())
    assert metrics.pop("ratio_mean") == 1.0 and metrics.pop("tokens/trained") == 9.0
    assert set(metrics.values()) == {0.0}


def test_sums_do_not_depend_on_how_micro_batches_are_cut():
    generator = torch.Generator().manual_seed(3)
    columns = [torch.randn(100, generator=generator) for _ in range(3)] + [torch.ones(100)]
    whole = step_sums(torch.tensor(1.0), *columns, **CLIP)
    parts = [step_sums(torch.tensor(0.25), *(c[i : i + 25] for c in columns), **CLIP) for i in range(0, 100, 25)]
    assert torch.allclose(sum(parts), whole, rtol=1e-5)


def test_a_step_without_response_tokens_divides_by_one():
    nothing = torch.zeros(3)
    metrics = step_metrics(step_sums(torch.tensor(0.0), nothing, nothing, nothing, nothing, **CLIP).tolist())
    assert set(metrics.values()) == {0.0}


def test_sums_keep_no_graph():
    logps = torch.zeros(2, requires_grad=True)
    assert not step_sums(logps.sum(), logps, logps, torch.ones(2), torch.ones(2), **CLIP).requires_grad


ENTROPIES = [torch.tensor([1.0]), torch.tensor([2.0, 2.0, 2.0]), torch.tensor([5.0, 7.0])]


def test_entropy_is_a_sum_over_tokens_and_the_references_is_a_sum_under_foreign_masks():
    # order [1, 2, 0]: row 0 (1 token) reads [2], row 1 (3 tokens) reads [5, 7] and a zero, row 2 (2 tokens) [1] and a zero
    assert scoring_sums(ENTROPIES, [1, 2, 0]).tolist() == [1 + 6 + 12, 2 + 12 + 1, 6]
    assert scoring_sums(ENTROPIES, [0, 1, 2]).tolist() == [19, 19, 6]


def test_one_reduction_carries_everything(accelerator):
    step = step_sums(torch.tensor(0.75), **by_hand(), **CLIP)
    metrics, loss = reduce_once(step, scoring_sums(ENTROPIES, [1, 2, 0]), accelerator)
    assert loss.item() == 0.75 and loss.dtype == torch.float32
    assert metrics["entropy"] == pytest.approx(19 / 6) and metrics["entropy_reference"] == pytest.approx(15 / 6)
    assert metrics["clip_ratio/low_mean"] == pytest.approx(0.2)
    assert 0.01 < metrics["memory/peak_gib"] < 1000
    later, _ = reduce_once(step, None, accelerator)
    assert set(metrics) - set(later) == {"entropy", "entropy_reference"}
