"""Every sequence is computed once, on every rank as many micro-batches, none over budget, and no rank waits for another."""

import random

import pytest

from justrl_trl.policy.balance import deal, load_imbalance, micro_batches_needed, plan_micro_batches


def random_lengths(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(1, 400) for _ in range(rng.randint(1, 64))]


@pytest.mark.parametrize("seed", range(20))
def test_every_index_is_dealt_once_and_no_part_is_empty(seed):
    lengths = random_lengths(seed)
    for count in {1, 2, len(lengths) // 2 or 1, len(lengths)} & set(range(1, len(lengths) + 1)):
        parts = deal(lengths, count)
        assert len(parts) == count and all(parts)
        assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
        assert all(part == sorted(part) for part in parts)


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_as_even_as_longest_first_promises(seed):
    lengths = random_lengths(seed)
    count = max(1, len(lengths) // 3)
    totals = [sum(lengths[i] for i in part) for part in deal(lengths, count)]
    # the heaviest part was the lightest when it got its last sequence, so it leads by at most that sequence
    assert max(totals) - min(totals) <= max(lengths)


def test_dealing_is_deterministic_by_hand():
    # longest first, each to the lightest part: 7 -> part 0, 5 -> 1, the first 4 -> 2; then totals are 7, 5, 4: 4 -> 2
    assert deal([4, 7, 4, 5], 3) == [[1], [3], [0, 2]]
    assert deal([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]
    assert deal([0, 0, 0], 3) == [[0], [1], [2]]  # even sequences of no tokens are spread


def test_equal_lengths_are_dealt_in_equal_counts():
    assert {len(part) for part in deal([100] * 64, 16)} == {4}


def test_a_micro_batch_without_a_sequence_is_refused_in_training():
    with pytest.raises(ValueError, match="cannot deal 3 sequences into 4 micro-batches"):
        plan_micro_batches([1, 2, 3], ranks=4, budget=10)


def test_a_rank_without_a_sequence_of_its_own_repeats_the_shortest():
    # 7 and 6 fill a micro-batch each; of four ranks two have nothing left but the 6
    plan = plan_micro_batches([7, 6], ranks=4, budget=7, repeat_shortest=True)
    assert sorted(plan) == [[[0]], [[1]], [[1]], [[1]]]


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_is_kept_with_as_many_micro_batches_as_needed_and_with_more(seed):
    lengths = random_lengths(seed)
    for budget in (max(lengths), 2 * max(lengths), sum(lengths)):
        needed = micro_batches_needed(lengths, 1, budget)
        assert needed >= sum(lengths) / budget
        # more would do as well
        for count in range(needed, min(needed + 6, len(lengths)) + 1):
            assert max(sum(lengths[i] for i in part) for part in deal(lengths, count)) <= budget
        # and no fewer would do
        for count in range(1, needed):
            assert max(sum(lengths[i] for i in part) for part in deal(lengths, count)) > budget


def test_a_sequence_over_the_budget_is_an_error_with_both_numbers_and_the_remedy():
    with pytest.raises(ValueError, match=r"sequence of 101 tokens.*max_tokens_per_micro_batch=100.*Raise the budget"):
        micro_batches_needed([5, 101, 7], 1, 100)
    assert micro_batches_needed([5, 100, 7], 1, 100) == 2


def justrl_lengths(seed: int, count: int = 512) -> list[int]:
    """Prompt and response tokens of an optimizer step late in a run: broad, a twentieth cut at 15,360."""
    rng = random.Random(seed)
    return [min(15360, max(50, int(rng.lognormvariate(8.1, 0.95)))) + rng.randint(60, 300) for _ in range(count)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(10))
def test_a_plan_holds_every_sequence_once_within_budget_and_alike_on_all_ranks(seed, ranks):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 400) for _ in range(ranks * rng.randint(1, 24))]
    for budget in (max(lengths), 2 * max(lengths), 10 * max(lengths), sum(lengths)):
        plan = plan_micro_batches(lengths, ranks, budget)
        assert len(plan) == ranks and len({len(parts) for parts in plan}) == 1
        parts = [part for parts in plan for part in parts]
        assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
        assert all(parts) and max(sum(lengths[i] for i in part) for part in parts) <= budget
        assert plan == plan_micro_batches(list(lengths), ranks, budget)  # all ranks come to the same


def test_as_few_sequences_as_ranks_and_one_of_them_as_long_as_the_budget():
    assert plan_micro_batches([100, 1], 2, 100) == [[[0]], [[1]]]
    # three that fill a micro-batch each need two on two ranks, and the fourth fills up
    plan = plan_micro_batches([100, 100, 100, 1], 2, 100)
    assert [len(parts) for parts in plan] == [2, 2]


@pytest.mark.parametrize("ranks", [2, 32])
@pytest.mark.parametrize("seed", range(5))
def test_at_the_recipes_size_no_rank_waits_more_than_a_fiftieth(seed, ranks):
    lengths = justrl_lengths(seed)
    assert load_imbalance(lengths, plan_micro_batches(lengths, ranks, 32768)) <= 1.02


def test_imbalance_counts_what_lockstep_costs():
    # micro-batch 0: 6 against 2, micro-batch 1: 1 against 5: ranks carry 7 and 7, and yet 6 + 5 pass instead of 7
    assert load_imbalance([6, 2, 1, 5], [[[0], [2]], [[1], [3]]]) == pytest.approx(11 / 7)
    assert load_imbalance([4, 4], [[[0]], [[1]]]) == 1.0
