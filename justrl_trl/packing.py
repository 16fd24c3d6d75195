"""Unpadded micro-batches: sequences laid end to end in one row, cut by a token budget, dealt out evenly.

With 15k-token caps and 5k-token means, padding would be two thirds of all tokens. A packed row has none: positions restart at
every sequence, and attention stays inside it (see `attention`).
"""

import heapq
import math
from dataclasses import dataclass

import torch


@dataclass
class Sequence:
    """One prompt with one response.

    Attributes:
        ids: `(L,)` int64 token ids, prompt then response, no padding.
        prompt_length: tokens of the prompt, at least 1.
    """

    ids: torch.Tensor
    prompt_length: int

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
        lengths: tokens of each sequence, in order; they sum to T.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    lengths: list[int]


def pack(sequences: list[Sequence], device: torch.device) -> PackedRow:
    """Lay `sequences` end to end in the given order."""
    input_ids = torch.cat([s.ids for s in sequences]).to(device)
    position_ids = torch.cat([torch.arange(len(s)) for s in sequences]).to(device)
    prompt = torch.cat([torch.arange(len(s)) < s.prompt_length for s in sequences]).to(device)
    labels = input_ids.masked_fill(prompt, -100)
    return PackedRow(input_ids[None], position_ids[None], labels[None], [len(s) for s in sequences])


def unpad(batch: dict[str, torch.Tensor]) -> list[Sequence]:
    """The rows of a TRL batch (`prompt_ids` left-padded, `completion_ids` right-padded, with masks) without the padding."""
    prompts, responses = batch["prompt_ids"].cpu(), batch["completion_ids"].cpu()
    prompt_masks, response_masks = batch["prompt_mask"].cpu().bool(), batch["completion_mask"].cpu().bool()
    return [
        Sequence(torch.cat([p[pm], r[rm]]), int(pm.sum()))
        for p, pm, r, rm in zip(prompts, prompt_masks, responses, response_masks, strict=True)
    ]


def micro_batches_needed(lengths: list[int], budget: int) -> int:
    """Fewest micro-batches for which `deal` keeps every one within `budget` tokens.

    Raises:
        ValueError: if one sequence alone is longer than the budget.
    """
    if max(lengths) > budget:
        raise ValueError(
            f"A sequence of {max(lengths)} tokens does not fit max_tokens_per_micro_batch={budget}. Raise the budget to at "
            "least max_prompt_length + max_completion_length."
        )
    count = math.ceil(sum(lengths) / budget)
    while max(sum(lengths[i] for i in part) for part in deal(lengths, count)) > budget:
        count += 1
    return count


def deal(lengths: list[int], count: int) -> list[list[int]]:
    """Deal indices into `count` parts of nearly equal token totals: longest first, each to the lightest part.

    Deterministic (ties go to the lower part), no part is empty while there are enough sequences, order inside a part is that
    of `lengths`.
    """
    if not 1 <= count <= len(lengths):
        raise ValueError(f"cannot deal {len(lengths)} sequences into {count} parts")
    parts: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, part) for part in range(count)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        total, part = heapq.heappop(heap)
        parts[part].append(index)
        heapq.heappush(heap, (total + max(lengths[index], 1), part))
    return [sorted(part) for part in parts]
