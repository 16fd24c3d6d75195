"""Advantages are the reference's, row by row, and depend on nothing but the rewards of a response's own group."""

import pytest
import torch

from justrl_trl.training.advantage import group_advantages
from tests.unit.recorded import both_sets, core_rows, differs, tensor


@both_sets
def test_advantages_equal_the_reference_on_every_recorded_row(which):
    disagreements, compared = [], 0
    for row in core_rows(which, "grpo_advantage"):
        inputs = row["inputs"]
        if not inputs["norm_adv_by_std_in_grpo"]:  # the recipe always divides by the deviation; there is no such mode here
            continue
        compared += 1
        number = {group: i for i, group in enumerate(dict.fromkeys(inputs["index"]))}
        group_ids = torch.tensor([number[group] for group in inputs["index"]])
        rewards = tensor(inputs["token_level_rewards"], row).sum(-1)
        got = group_advantages(rewards, group_ids, inputs["epsilon"])[:, None] * tensor(inputs["response_mask"], row)
        # float32 rewards such as eight times -1.3 have a mean that rounds: what was recorded is that noise / epsilon
        noise = row["tag"] in ("zero-std-nondyadic", "tiny-std")
        atol = 0.4 if noise and inputs["dtype"] == "float32" else None
        if got.dtype != rewards.dtype or differs(got, row["outputs"]["advantages"], row, atol):
            disagreements.append((row["id"], row["tag"]))
    assert compared and not disagreements, f"{len(disagreements)} of {compared} rows: {disagreements}"


def test_one_right_of_four_by_hand():
    # mean -0.5; deviations 1.5, -0.5, -0.5, -0.5; unbiased variance (2.25 + 3 x 0.25) / 3 = 1
    got = group_advantages(torch.tensor([1.0, -1.0, -1.0, -1.0]), torch.zeros(4, dtype=torch.int64), epsilon=0.0)
    assert got.tolist() == [1.5, -0.5, -0.5, -0.5]


def test_epsilon_is_added_to_the_deviation_and_not_to_the_variance():
    # deviation of (1, -1) is sqrt(2): with epsilon 1 the advantage is 1 / (sqrt(2) + 1) = sqrt(2) - 1
    got = group_advantages(torch.tensor([1.0, -1.0]), torch.tensor([0, 0]), epsilon=1.0)
    assert got.tolist() == pytest.approx([2**0.5 - 1, 1 - 2**0.5])


def test_default_epsilon_is_the_reference_one():
    rewards, groups = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0, 0])
    assert group_advantages(rewards, groups)[0].item() == pytest.approx(1 / (2**0.5 + 1e-6), rel=1e-12)


@pytest.mark.parametrize("reward", [1.0, -1.0, 0.0, 0.5])
def test_group_of_equal_rewards_is_exactly_zero(reward):
    got = group_advantages(torch.full((8,), reward), torch.zeros(8, dtype=torch.int64))
    assert got.tolist() == [0.0] * 8


def test_group_of_one_counts_as_mean_0_and_deviation_1():
    rewards = torch.tensor([0.7, -1.0, 1.0], dtype=torch.float64)
    got = group_advantages(rewards, torch.tensor([5, 9, 2]))
    assert got.tolist() == pytest.approx([0.7 / (1 + 1e-6), -1 / (1 + 1e-6), 1 / (1 + 1e-6)], rel=1e-12)


def test_order_of_responses_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(16).repeat_interleave(8)
    rewards = torch.randint(0, 2, (128,), generator=generator) * 2.0 - 1
    expected = group_advantages(rewards, groups)
    for _ in range(5):
        order = torch.randperm(128, generator=generator)
        assert torch.allclose(group_advantages(rewards[order], groups[order]), expected[order], atol=1e-6)


def test_other_groups_do_not_matter():
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(24, generator=generator, dtype=torch.float64)
    groups = torch.tensor([0] * 3 + [1] * 8 + [2] * 13)  # groups of unequal size
    whole = group_advantages(rewards, groups)
    alone = [group_advantages(rewards[groups == g], groups[groups == g]) for g in range(3)]
    assert torch.allclose(whole, torch.cat(alone), rtol=1e-12)


def test_names_of_groups_do_not_matter():
    rewards = torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert torch.equal(
        group_advantages(rewards, torch.tensor([0, 0, 1, 1])), group_advantages(rewards, torch.tensor([70, 70, -3, -3]))
    )


def test_advantages_of_a_group_sum_to_zero_and_have_deviation_one():
    rewards = torch.randn(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = group_advantages(rewards, torch.arange(64) % 8).view(8, 8)  # column = group
    assert got.sum(0).abs().max() < 1e-12
    assert got.std(0).tolist() == pytest.approx([1.0] * 8, rel=1e-5)  # epsilon takes 1e-6 of it


@pytest.mark.parametrize(("rewards", "groups"), [((4,), (3,)), ((2, 2), (2, 2)), ((4, 1), (4,))])
def test_shapes_that_cannot_be_meant_are_refused(rewards, groups):
    with pytest.raises(ValueError, match="must be 1-D and alike"):
        group_advantages(torch.zeros(rewards), torch.zeros(groups, dtype=torch.int64))


def test_a_reward_that_nobody_knew_counts_for_nothing():
    rewards = torch.tensor([1.0, -1.0, torch.nan, 1.0, torch.nan, torch.nan])
    got = group_advantages(rewards, torch.tensor([0, 0, 0, 0, 1, 1]))
    without = group_advantages(torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0, 0, 0]))
    assert torch.equal(got[[0, 1, 3]], without) and got[[2, 4, 5]].tolist() == [0.0, 0.0, 0.0]
