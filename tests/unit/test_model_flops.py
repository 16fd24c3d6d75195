"""The operations that utilization counts are those that PyTorch counts in a forward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.model_flops import forward_flops, utilization
from tests.side_by_side import small_model


def test_a_forward_pass_has_the_operations_that_pytorch_counts():
    model = small_model(tied=False, vocabulary=512).eval()
    model.set_attn_implementation("eager")  # whose products the counter sees
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.randint(512, (1, 300)))
    # eager attention computes the upper triangle as well: 4 layers x 4 x 64 x 300^2 / 2 more than the causal half
    counted = counter.get_total_flops() - 4 * 4 * 64 * 300**2 / 2
    assert forward_flops(model.config, [(0, 300)]) == pytest.approx(counted, rel=1e-3)  # rotary angles are not counted here


def test_the_head_is_counted_for_response_tokens_only():
    config = small_model(tied=False, vocabulary=512).config
    saved = forward_flops(config, [(0, 300)]) - forward_flops(config, [(100, 200)])
    assert saved == 2 * 100 * 64 * 512


def test_training_is_three_forward_passes_and_scoring_one():
    seconds = {"scoring": 1.0, "forward_backward": 5.0, "optimizer": 1.0}
    found = utilization(forward=1e12, seconds=seconds, peak_tflops=1.0)
    assert found == pytest.approx({"mfu_training": 3 / 6, "mfu_training_and_scoring": 4 / 7})
