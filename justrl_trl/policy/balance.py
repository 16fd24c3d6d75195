"""Deal the sequences of an optimizer step into micro-batches of equal work on all ranks.

ZeRO-3 keeps ranks in lockstep, forward pass by forward pass, so the time of an optimizer step is the sum over micro-batches of
the *heaviest rank's* tokens. Hence sequences are dealt over all ranks' micro-batches at once, longest first, and micro-batches
of like weight run at the same time. Every rank computes the same plan from the same table of lengths; nothing is negotiated.
"""

import heapq
import math

Plan = list[list[list[int]]]  # [rank][micro-batch] -> indices of sequences


def plan_micro_batches(lengths: list[int], ranks: int, budget: int, repeat_shortest: bool = False) -> Plan:
    """Deal sequences to ranks and micro-batches: the same number on every rank, none empty, none over `budget` tokens.

    Args:
        lengths: tokens (prompt + response) of every sequence, over all ranks.
        ranks: number of ranks.
        budget: tokens that one micro-batch may hold (`max_tokens_per_micro_batch`).
        repeat_shortest: where there are fewer sequences than micro-batches, let the shortest one be in several. For forward
            passes only: in training it would count twice.

    Raises:
        ValueError: if one sequence alone is longer than the budget, or there are too few and none may be repeated.
    """
    bins = deal(lengths, ranks * micro_batches_needed(lengths, ranks, budget))
    if not all(bins):
        if not repeat_shortest:
            raise ValueError(f"cannot deal {len(lengths)} sequences into {len(bins)} micro-batches")
        shortest = min(range(len(lengths)), key=lambda i: lengths[i])
        bins = [one or [shortest] for one in bins]
    weights = [sum(lengths[i] for i in one) for one in bins]
    heaviest_first = sorted(range(len(bins)), key=lambda b: (-weights[b], b))
    plan: Plan = [[] for _ in range(ranks)]
    carried = [0] * ranks
    for start in range(0, len(bins), ranks):
        # of the bins that run at the same time, the heaviest goes to the rank that has carried least
        lightest_first = sorted(range(ranks), key=lambda rank: (carried[rank], rank))
        for rank, b in zip(lightest_first, heaviest_first[start : start + ranks], strict=True):
            plan[rank].append(bins[b])
            carried[rank] += weights[b]
    return plan


def micro_batches_needed(lengths: list[int], ranks: int, budget: int) -> int:
    """Fewest micro-batches per rank for which `deal` keeps every one within `budget` tokens.

    Raises:
        ValueError: if one sequence alone is longer than the budget.
    """
    if max(lengths) > budget:
        raise ValueError(
            f"A sequence of {max(lengths)} tokens does not fit max_tokens_per_micro_batch={budget}. Raise the budget to at "
            "least max_prompt_length + max_completion_length."
        )
    count = math.ceil(sum(lengths) / (budget * ranks))
    while max(sum(lengths[i] for i in one) for one in deal(lengths, ranks * count)) > budget:
        count += 1
    return count


def deal(lengths: list[int], count: int) -> list[list[int]]:
    """Deal indices into `count` bins of nearly equal token totals: longest first, each to the lightest bin.

    Deterministic (ties go to the lower bin), no bin is empty while there are enough sequences, order inside a bin is that of
    `lengths`.
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, b) for b in range(count)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        total, b = heapq.heappop(heap)
        bins[b].append(index)
        heapq.heappush(heap, (total + max(lengths[index], 1), b))
    return [sorted(one) for one in bins]


def load_imbalance(lengths: list[int], plan: Plan) -> float:
    """Time of an optimizer step relative to a perfect split: sum over micro-batches of the heaviest rank's tokens, divided by
    tokens per rank. 1.0 is perfect."""
    weights = [[sum(lengths[i] for i in part) for part in parts] for parts in plan]
    return sum(map(max, zip(*weights, strict=True))) * len(plan) / max(sum(lengths), 1)
