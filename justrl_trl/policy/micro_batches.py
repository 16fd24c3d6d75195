"""Exchange the responses of all ranks and cut each rank's micro-batches.

TRL leaves every rank with the responses to its own prompts, cut into optimizer steps. Ranks show each other all of them once
per rollout step (three gathers), plan together (`balance`), and keep their share as packed rows.
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from justrl_trl.distributed import gather_ragged
from justrl_trl.policy.balance import load_imbalance, plan_micro_batches
from justrl_trl.policy.packing import PackedRow, Sequence, pack


@dataclass
class MicroBatch:
    """Sequences that go through the model together.

    Attributes:
        row: the sequences, packed.
        advantages: `(N,)` float32, of each response token of the row.
        indices: place of each sequence in the rollout step, over all ranks (see `exchange`).
        response_lengths: response tokens of each sequence; they sum to N.
        old_logps: `(N,)` float32, log-probabilities under the sampling policy; None until scored.
    """

    row: PackedRow
    advantages: torch.Tensor
    indices: list[int]
    response_lengths: list[int]
    old_logps: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Response tokens N."""
        return sum(self.response_lengths)


@dataclass
class OptimizerStep:
    """This rank's part of one optimizer step.

    Attributes:
        micro_batches: as many as on every other rank.
        sequences, tokens: of the whole optimizer step, over all ranks; tokens are response tokens.
        load_imbalance: 1.0 when no rank ever waits for another (see `balance.load_imbalance`).
    """

    micro_batches: list[MicroBatch]
    sequences: int
    tokens: int
    load_imbalance: float


def exchange(steps: list[list[Sequence]], accelerator: Accelerator) -> list[Sequence]:
    """Every rank's sequences on every rank, in rank order; of a rank, in the order of its optimizer steps.

    Args:
        steps: this rank's sequences of each optimizer step of the rollout step; equal counts on every rank.
    """
    own = [sequence for step in steps for sequence in step]
    rows = gather_ragged([s.ids for s in own], accelerator)
    facts = [[s.prompt_length, s.advantage, s.row] for s in own]
    facts = accelerator.gather(torch.tensor(facts, dtype=torch.float64, device=accelerator.device)).tolist()
    return [Sequence(ids, int(prompt), advantage, int(row)) for ids, (prompt, advantage, row) in zip(rows, facts, strict=True)]


def share_out(everyone: list[Sequence], steps: int, accelerator: Accelerator, budget: int) -> list[OptimizerStep]:
    """Deal the sequences of all ranks' optimizer steps out again, evenly, as micro-batches of at most `budget` tokens.

    Which sequences make an optimizer step does not change, only who computes them.

    Args:
        everyone: from `exchange`.
        steps: optimizer steps of the rollout step.
        budget: tokens per micro-batch (`max_tokens_per_micro_batch`).

    Returns:
        This rank's share of each.
    """
    per_rank = len(everyone) // accelerator.num_processes
    per_step = per_rank // steps
    shares = []
    for number in range(steps):
        starts = range(number * per_step, len(everyone), per_rank)  # where this optimizer step begins in each rank's rows
        indices = [start + i for start in starts for i in range(per_step)]
        lengths = [len(everyone[i]) for i in indices]
        plan = plan_micro_batches(lengths, accelerator.num_processes, budget)
        mine = [[indices[i] for i in part] for part in plan[accelerator.process_index]]
        shares.append(
            OptimizerStep(
                micro_batches=[_micro_batch(everyone, part, accelerator.device) for part in mine],
                sequences=len(indices),
                tokens=sum(everyone[i].response_length for i in indices),
                load_imbalance=load_imbalance(lengths, plan),
            )
        )
    return shares


def _micro_batch(everyone: list[Sequence], indices: list[int], device: torch.device) -> MicroBatch:
    sequences = [everyone[i] for i in indices]
    counts = [s.response_length for s in sequences]
    advantages = torch.tensor([s.advantage for s in sequences]).repeat_interleave(torch.tensor(counts))
    return MicroBatch(pack(sequences, device), advantages.to(device), indices, counts)


def scored_sequences(steps: list[OptimizerStep], count: int) -> tuple[list[Sequence], torch.Tensor]:
    """The first `count` sequences of this rank that have a response, and their old log-probabilities in a row, `(N,)`."""
    found: list[tuple[Sequence, torch.Tensor]] = []
    for batch in (batch for step in steps for batch in step.micro_batches):
        ids, logps = batch.row.input_ids[0].cpu().split(batch.row.lengths), batch.old_logps.split(batch.response_lengths)
        found += [(Sequence(i, len(i) - len(lp)), lp) for i, lp in zip(ids, logps, strict=True) if len(lp)]
        if len(found) >= count:
            break
    found = found[:count]
    return [sequence for sequence, _ in found], torch.cat([logps for _, logps in found] or [torch.zeros(0)])
