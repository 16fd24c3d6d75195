"""A rollout step is shared out whole: every sequence once, in its optimizer step, with its tokens and its advantage."""

import pytest
import torch

from justrl_trl.policy.micro_batches import exchange, share_out
from tests.unit.policy.test_packing import random_sequences


@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_is_in_its_optimizer_step_with_its_tokens_and_advantage(accelerator, seed):
    sequences = random_sequences(seed, count=24)
    steps = [sequences[i : i + 6] for i in range(0, 24, 6)]
    shared = share_out(exchange(steps, accelerator), 4, accelerator, budget=80)
    for number, (step, own) in enumerate(zip(shared, steps, strict=True)):
        assert step.sequences == 6 and step.tokens == sum(s.response_length for s in own)
        indices = [i for batch in step.micro_batches for i in batch.indices]
        assert sorted(indices) == list(range(6 * number, 6 * number + 6))
        for batch in step.micro_batches:
            assert sum(batch.row.lengths) <= 80 and batch.old_logps is None
            members = [sequences[i] for i in batch.indices]
            assert batch.row.input_ids[0].tolist() == [t for s in members for t in s.ids.tolist()]
            assert batch.row.targets.tolist() == [t for s in members for t in s.ids[s.prompt_length :].tolist()]
            assert batch.advantages.tolist() == [s.advantage for s in members for _ in range(s.response_length)]
            assert batch.tokens == len(batch.advantages) == len(batch.row.scored)


def test_ids_keep_their_value_on_the_way(accelerator):
    from justrl_trl.policy.packing import Sequence

    largest = Sequence(torch.tensor([151935, 0, 7]), 1, advantage=-2.474873734152916)
    batch = share_out(exchange([[largest]], accelerator), 1, accelerator, budget=3)[0].micro_batches[0]
    assert batch.row.input_ids.tolist() == [[151935, 0, 7]]
    assert batch.advantages.tolist() == pytest.approx([-2.474873734152916] * 2)
