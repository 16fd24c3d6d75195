"""Packing loses no token, crosses no boundary and keeps its budget; dealing is even and the same every time."""

import random

import pytest
import torch

from justrl_trl.packing import Sequence, deal, micro_batches_needed, pack, unpad

CPU = torch.device("cpu")


def random_sequences(seed: int, count: int = 24, longest: int = 40) -> list[Sequence]:
    """Sequences of distinct tokens, so that each token can be told from every other; responses may be empty."""
    rng, sequences, token = random.Random(seed), [], 0
    for _ in range(count):
        length = rng.randint(1, longest)
        sequences.append(Sequence(torch.arange(token, token + length), rng.randint(1, length)))
        token += length
    return sequences


@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_packed_once_in_order_with_its_boundaries(seed):
    sequences = random_sequences(seed)
    row = pack(sequences, CPU)
    assert row.lengths == [len(s) for s in sequences]
    assert row.input_ids.shape == row.position_ids.shape == row.labels.shape == (1, sum(row.lengths))
    assert row.input_ids[0].tolist() == list(range(sum(row.lengths)))
    for piece, sequence in zip(row.input_ids[0].split(row.lengths), sequences, strict=True):
        assert torch.equal(piece, sequence.ids)


@pytest.mark.parametrize("seed", range(5))
def test_positions_restart_at_every_sequence(seed):
    row = pack(random_sequences(seed), CPU)
    for piece in row.position_ids[0].split(row.lengths):
        assert piece.tolist() == list(range(len(piece)))


@pytest.mark.parametrize("seed", range(5))
def test_labels_are_the_response_tokens_and_nothing_else(seed):
    sequences = random_sequences(seed)
    row = pack(sequences, CPU)
    for piece, sequence in zip(row.labels[0].split(row.lengths), sequences, strict=True):
        prompt = sequence.prompt_length
        assert piece[:prompt].tolist() == [-100] * prompt
        assert torch.equal(piece[prompt:], sequence.ids[prompt:])
    scored = row.labels[0, 1:] != -100  # what the shifted loss looks at
    assert int(scored.sum()) == sum(s.response_length for s in sequences)


def test_no_sequence_predicts_the_first_token_of_the_next():
    sequences = random_sequences(9)
    row = pack(sequences, CPU)
    starts = torch.tensor(row.lengths).cumsum(0)[:-1]
    assert (row.labels[0, starts] == -100).all()


def padded(sequences: list[Sequence], pad: int) -> dict[str, torch.Tensor]:
    """The batch that TRL would make of them: prompts padded left, responses padded right."""
    prompt_width = max(s.prompt_length for s in sequences) + 2
    response_width = max(s.response_length for s in sequences) + 3
    batch = {
        "prompt_ids": torch.full((len(sequences), prompt_width), pad),
        "prompt_mask": torch.zeros(len(sequences), prompt_width, dtype=torch.int64),
        "completion_ids": torch.full((len(sequences), response_width), pad),
        "completion_mask": torch.zeros(len(sequences), response_width, dtype=torch.int64),
    }
    for i, s in enumerate(sequences):
        batch["prompt_ids"][i, prompt_width - s.prompt_length :] = s.ids[: s.prompt_length]
        batch["prompt_mask"][i, prompt_width - s.prompt_length :] = 1
        batch["completion_ids"][i, : s.response_length] = s.ids[s.prompt_length :]
        batch["completion_mask"][i, : s.response_length] = 1
    return batch


@pytest.mark.parametrize("seed", range(5))
def test_unpadding_undoes_padding(seed):
    sequences = random_sequences(seed)
    # the pad token is also a token of the first sequence: masks decide, not ids
    for back, original in zip(unpad(padded(sequences, pad=0)), sequences, strict=True):
        assert torch.equal(back.ids, original.ids)
        assert (back.prompt_length, back.response_length) == (original.prompt_length, original.response_length)


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


@pytest.mark.parametrize("count", [0, 4])
def test_a_part_without_a_sequence_is_refused(count):
    with pytest.raises(ValueError, match=rf"cannot deal 3 sequences into {count} parts"):
        deal([1, 2, 3], count)


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_is_kept_with_as_many_micro_batches_as_needed_and_with_more(seed):
    lengths = random_lengths(seed)
    for budget in (max(lengths), 2 * max(lengths), sum(lengths)):
        needed = micro_batches_needed(lengths, budget)
        assert needed >= sum(lengths) / budget
        # a rank follows the neediest one, so it may have to deal into more parts than it needs itself
        for count in range(needed, min(needed + 6, len(lengths)) + 1):
            assert max(sum(lengths[i] for i in part) for part in deal(lengths, count)) <= budget
        # and no fewer would do
        for count in range(1, needed):
            assert max(sum(lengths[i] for i in part) for part in deal(lengths, count)) > budget


def test_a_sequence_over_the_budget_is_an_error_with_both_numbers_and_the_remedy():
    with pytest.raises(ValueError, match=r"sequence of 101 tokens.*max_tokens_per_micro_batch=100.*Raise the budget"):
        micro_batches_needed([5, 101, 7], 100)
    assert micro_batches_needed([5, 100, 7], 100) == 2
