"""Unpadded rows: sequences laid end to end.

With 15k-token caps and 5k-token means, padding would be two thirds of all tokens. A packed row has none: positions restart at
every sequence, and attention stays inside it (see `attention`).
"""

from dataclasses import dataclass

import torch


@dataclass
class Sequence:
    """One prompt with one response.

    Attributes:
        ids: `(L,)` token ids, prompt then response, no padding.
        prompt_length: tokens of the prompt, at least 1.
        advantage: of the response.
        row: place of the response in the rollout step as it was sampled: prompt after prompt, over all ranks.
    """

    ids: torch.Tensor
    prompt_length: int
    advantage: float = 0.0
    row: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def response_length(self) -> int:
        return len(self.ids) - self.prompt_length


@dataclass
class PackedRow:
    """Sequences end to end, ready for one forward pass.

    Attributes:
        input_ids, position_ids, labels: `(1, T)`; labels are -100 on prompts, so that the shifted loss never crosses from one
            sequence into the next (each begins with at least one prompt token).
        scored: `(N,)` places in the row whose next token is a response token: where log-probabilities are read. Made here, on
            the host, because selecting by mask would wait for the GPU.
        boundaries: `(sequences + 1,)` int32, where each sequence begins, and T.
        lengths: tokens of each sequence, in order; they sum to T.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    scored: torch.Tensor
    boundaries: torch.Tensor
    lengths: list[int]

    @property
    def targets(self) -> torch.Tensor:
        """`(N,)` the response tokens."""
        return self.input_ids[0, self.scored + 1]


def pack(sequences: list[Sequence], device: torch.device) -> PackedRow:
    """Lay `sequences` end to end in the given order."""
    input_ids = torch.cat([s.ids for s in sequences]).long()
    position_ids = torch.cat([torch.arange(len(s)) for s in sequences])
    prompt = torch.cat([torch.arange(len(s)) < s.prompt_length for s in sequences])
    labels = input_ids.masked_fill(prompt, -100)
    scored = (~prompt[1:]).nonzero()[:, 0]
    lengths = [len(s) for s in sequences]
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    tensors = (input_ids[None], position_ids[None], labels[None], scored, boundaries)
    return PackedRow(*(t.to(device) for t in tensors), lengths=lengths)


def unpad(batch: dict[str, torch.Tensor]) -> list[Sequence]:
    """The rows of a TRL batch without the padding: `prompt_ids` are left-padded, `completion_ids` right-padded, with masks;
    beside them `advantages` and `rollout_row`."""
    prompts, responses = batch["prompt_ids"].cpu(), batch["completion_ids"].cpu()
    prompt_masks, response_masks = batch["prompt_mask"].cpu().bool(), batch["completion_mask"].cpu().bool()
    advantages, rows = batch["advantages"].tolist(), batch["rollout_row"].tolist()
    return [
        Sequence(torch.cat([p[pm], r[rm]]), int(pm.sum()), advantage, row)
        for p, pm, r, rm, advantage, row in zip(prompts, prompt_masks, responses, response_masks, advantages, rows, strict=True)
    ]
