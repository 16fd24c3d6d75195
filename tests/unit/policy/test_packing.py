"""Packing loses no token and crosses no boundary, and unpadding undoes padding."""

import random

import pytest
import torch

from justrl_trl.policy.packing import Sequence, pack, unpad

CPU = torch.device("cpu")


def random_sequences(seed: int, count: int = 24, longest: int = 40) -> list[Sequence]:
    """Sequences of distinct tokens, so that each token can be told from every other; responses may be empty."""
    rng, sequences, token = random.Random(seed), [], 0
    for _ in range(count):
        length = rng.randint(1, longest)
        sequences.append(Sequence(torch.arange(token, token + length), rng.randint(1, length), rng.choice([-1.5, 0.0, 0.5])))
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
    # what the shifted loss looks at
    assert torch.equal(row.scored, (row.labels[0, 1:] != -100).nonzero()[:, 0])
    assert len(row.scored) == sum(s.response_length for s in sequences)
    assert torch.equal(row.targets, torch.cat([s.ids[s.prompt_length :] for s in sequences]))


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
        "advantages": torch.tensor([s.advantage for s in sequences]),
        "rollout_row": torch.tensor([s.row for s in sequences]),
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
    for row, one in enumerate(sequences):
        one.row = 7 * row
    # the pad token is also a token of the first sequence: masks decide, not ids
    for back, original in zip(unpad(padded(sequences, pad=0)), sequences, strict=True):
        assert torch.equal(back.ids, original.ids)
        assert (back.prompt_length, back.advantage, back.row) == (original.prompt_length, original.advantage, original.row)
