"""Skipped updates are counted, and nothing but skipped updates ends the run."""

import pytest
import torch

from justrl_trl.training.optimizer import NonFiniteGradientError, SkipCounter, is_finite


def test_skips_are_counted_until_taken():
    counter = SkipCounter(limit=3)
    for skipped in (True, False, True, True, False):
        counter.record(skipped)
    assert counter.take() == 3 and counter.take() == 0


def test_only_skips_in_a_row_end_the_run():
    counter = SkipCounter(limit=3)
    for skipped in (True, True, False, True, True):
        counter.record(skipped)
    with pytest.raises(NonFiniteGradientError, match=r"3 optimizer steps in a row .*max_skipped_steps=3"):
        counter.record(True)


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), torch.tensor(float("nan")), torch.tensor(float("inf"))])
def test_a_norm_that_is_not_finite_allows_no_update(norm):
    assert not is_finite(norm)


@pytest.mark.parametrize("norm", [0.0, 3.5, torch.tensor(1e30)])
def test_a_finite_norm_does(norm):
    assert is_finite(norm)
