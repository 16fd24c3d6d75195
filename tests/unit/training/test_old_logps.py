"""Whoever scores a response, and whenever: whoever trains on it has its log-probabilities."""

import random

import pytest
import torch

from justrl_trl.policy.micro_batches import exchange, share_out
from justrl_trl.training.old_logps import Scores, reference_order
from tests.unit.policy.test_packing import random_sequences


def forward(row) -> tuple[torch.Tensor, torch.Tensor]:
    """A "model" whose log-probability of a token says which token it is and where: any mix-up shows."""
    places = row.position_ids[0, row.scored + 1].float()
    return -(row.targets.float() + places / 1000), row.targets.float() / 7


def numbered(seed: int, count: int) -> list:
    sequences = random_sequences(seed, count)
    for row, one in enumerate(sequences):
        one.row = row
    return sequences


def expected(sequence) -> list[float]:
    ids = sequence.ids.tolist()
    return [-(ids[i] + i / 1000) for i in range(sequence.prompt_length, len(ids))]


@pytest.mark.parametrize("waves", [[], [5], [7, 8, 9, 10], [1, 24]], ids=str)
def test_every_token_gets_its_own_log_probability_in_however_many_waves(accelerator, waves):
    sequences = numbered(0, 24)
    scores, shuffled = Scores(forward, accelerator, budget=80), random.Random(1).sample(sequences, 24)
    for first, last in zip([0, *waves], waves, strict=False):
        scores.score(shuffled[first:last])
    everyone = exchange([sequences[i : i + 6] for i in range(0, 24, 6)], accelerator)
    scores.score(everyone)
    steps = share_out(everyone, 4, accelerator, budget=80)
    scores.hand_out(everyone, steps)
    for batch in (batch for step in steps for batch in step.micro_batches):
        logps = [value for i in batch.indices for value in expected(sequences[i])]
        assert batch.old_logps.tolist() == pytest.approx(logps)
    entropy, reference, tokens = scores.sums(everyone).tolist()
    assert tokens == sum(s.response_length for s in sequences)
    assert entropy == pytest.approx(sum(float(s.ids[s.prompt_length :].sum()) / 7 for s in sequences))
    assert 0 < reference < entropy


def test_a_rank_that_only_repeated_others_sequences_has_no_entropy_of_its_own(accelerator):
    assert Scores(forward, accelerator, budget=80).sums(numbered(1, 3)).tolist() == [0, 0, 0]


def test_nothing_is_scored_twice(accelerator):
    seen = []
    scores = Scores(lambda row: (seen.extend(row.lengths), forward(row))[1], accelerator, budget=80)
    sequences = numbered(2, 12)
    for part in (sequences[:5], sequences[3:9], sequences):
        scores.score(part)
    assert sorted(seen) == sorted(map(len, sequences))


def test_a_response_that_is_masked_after_it_was_scored_counts_for_nothing(accelerator):
    sequences = numbered(3, 6)
    scores = Scores(forward, accelerator, budget=80)
    scores.score(sequences)
    masked = sequences[2]
    lost = masked.response_length
    masked.ids = masked.ids[: masked.prompt_length]
    everyone = exchange([sequences], accelerator)
    steps = share_out(everyone, 1, accelerator, budget=80)
    scores.hand_out(everyone, steps)
    assert lost and sum(len(batch.old_logps) for batch in steps[0].micro_batches) == sum(s.response_length for s in sequences)
    assert scores.sums(everyone)[2] == sum(s.response_length for s in sequences)


def test_the_references_order_is_its_micro_batches_one_after_another():
    # two micro-batches of at most 10: 9 to the first, 6 and then 3 to the second, 1 to the first (9 and 9: the lower one)
    assert reference_order([6, 9, 1, 3], budget=10) == [1, 2, 0, 3]
    assert reference_order([6, 9, 1, 3], budget=100) == [0, 1, 2, 3]  # one micro-batch permutes nothing


def test_the_references_order_is_a_permutation():
    rng = random.Random(0)
    lengths = [rng.randint(1, 500) for _ in range(64)]
    order = reference_order(lengths, budget=600)
    assert sorted(order) == list(range(64)) and order != list(range(64))
