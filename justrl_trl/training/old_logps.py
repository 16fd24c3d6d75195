"""Old log-probabilities: score every response under the policy that sampled it, before the first update.

The reference scores after the last response. Here responses can be scored wave by wave, while the servers still work on the
longest ones (see `rollouts.generation`): at the paper's lengths most servers idle during the second half of a generation, and
trainers during all of it. In general one rank scores a response and another one trains on it, so log-probabilities are
exchanged once, when the rollout step is complete.
"""

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator

from justrl_trl.policy.balance import deal, micro_batches_needed, plan_micro_batches
from justrl_trl.policy.micro_batches import OptimizerStep
from justrl_trl.policy.packing import PackedRow, Sequence, pack
from justrl_trl.training.metrics import SCORING_SUMS, scoring_sums


class Scores:
    """Log-probabilities and entropies of one rollout step; every method is called on every rank, with the same arguments.

    Args:
        forward: log-probability and entropy, `(N,)` each, of every response token of a packed row; a collective under ZeRO-3.
        accelerator: of the trainer.
        budget: tokens of a forward pass (`max_tokens_per_micro_batch`).
    """

    def __init__(
        self, forward: Callable[[PackedRow], tuple[torch.Tensor, torch.Tensor]], accelerator: Accelerator, budget: int
    ):
        self._forward, self._accelerator, self._budget = forward, accelerator, budget
        self._logps: list[torch.Tensor] = []  # what this rank has scored, (N,) float32 per forward pass
        self._entropies: dict[int, torch.Tensor] = {}  # of this rank's rows
        self._lengths: dict[int, int] = {}  # tokens, prompt and response, of this rank's rows
        self._held: list[list[tuple[int, int]]] = [
            [] for _ in range(accelerator.num_processes)
        ]  # [rank] (row, tokens), in order
        self._known: set[int] = set()

    @torch.no_grad()
    def score(self, sequences: Iterable[Sequence]) -> None:
        """Share these out and score them. Rows that are scored already are passed over."""
        sequences = [s for s in sequences if s.row not in self._known]
        if not sequences:
            return
        self._known |= {s.row for s in sequences}
        lengths = [len(s) for s in sequences]
        # ranks run in lockstep, so one without work of its own repeats the shortest sequence
        plan = plan_micro_batches(lengths, self._accelerator.num_processes, self._budget, repeat_shortest=True)
        scorer: dict[int, int] = {}  # row -> the rank whose result counts
        for rank, parts in enumerate(plan):
            for row, tokens in ((sequences[i].row, sequences[i].response_length) for part in parts for i in part):
                self._held[rank].append((row, tokens))
                scorer.setdefault(row, rank)
        for part in plan[self._accelerator.process_index]:
            own = [sequences[i] for i in part]
            logps, entropy = self._forward(pack(own, self._accelerator.device))
            self._logps.append(logps.float())
            for s, one in zip(own, entropy.split([s.response_length for s in own]), strict=True):
                if scorer[s.row] == self._accelerator.process_index:
                    self._entropies[s.row], self._lengths[s.row] = one, len(s)

    def hand_out(self, everyone: list[Sequence], steps: list[OptimizerStep]) -> None:
        """Give this rank's micro-batches the log-probabilities of their responses: one gather.

        Args:
            everyone: the sequences of the rollout step, as `policy.micro_batches.exchange` orders them; all scored.
            steps: this rank's share, from `policy.micro_batches.share_out`; `old_logps` is filled in.
        """
        sizes = [sum(tokens for _, tokens in held) for held in self._held]
        own = torch.zeros(max(sizes), dtype=torch.float32, device=self._accelerator.device)
        own[: sizes[self._accelerator.process_index]] = torch.cat(self._logps)
        found: dict[int, torch.Tensor] = {}
        for held, flat in zip(self._held, self._accelerator.gather(own).view(len(sizes), -1), strict=True):
            rows, tokens = [row for row, _ in held], [count for _, count in held]
            found |= zip(rows, flat[: sum(tokens)].split(tokens), strict=True)
        for batch in (batch for step in steps for batch in step.micro_batches):
            members = [everyone[i] for i in batch.indices]
            # a response that is masked after it was scored has no tokens left
            batch.old_logps = torch.cat([found[s.row][: s.response_length] for s in members])

    def sums(self, everyone: list[Sequence]) -> torch.Tensor:
        """This rank's `metrics.SCORING_SUMS`, `(3,)`: entropy costs nothing extra here, and the reference logs it here too."""
        rows = [s for s in everyone if s.row in self._entropies]
        if not rows:  # of few sequences on many ranks, this one got none but repeated ones
            return torch.zeros(len(SCORING_SUMS), dtype=torch.float64, device=self._accelerator.device)
        rows.sort(key=lambda s: s.row)
        entropies = [self._entropies[s.row][: s.response_length] for s in rows]
        order = reference_order([self._lengths[s.row] for s in rows], self._budget)
        return scoring_sums(entropies, order)


def reference_order(lengths: list[int], budget: int) -> list[int]:
    """The order in which the reference's scoring pass leaves the rows of a rank: micro-batch after micro-batch.

    It restores the order of the log-probabilities but not of the entropies (`verl/workers/actor/dp_actor.py`,
    `compute_log_prob`), which is why its entropy metric is wrong.
    """
    return [i for part in deal(lengths, micro_batches_needed(lengths, 1, budget)) for i in part]
