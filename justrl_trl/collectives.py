"""Two things that ranks say to each other besides gradients: ragged token rows, and "I failed, so we all stop"."""

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list


class StoppedByRankZero(RuntimeError):
    """Rank 0 failed and said why; this rank has nothing to add."""


def gather_ragged(rows: list[torch.Tensor], accelerator: Accelerator) -> list[torch.Tensor]:
    """All ranks' rows in rank order, on every rank. Every rank must hold the same number of rows.

    Two gathers: lengths, then flat int32 tokens padded to the longest rank.

    Args:
        rows: 1-D integer tensors.

    Returns:
        int32 CPU tensors, views into one.
    """
    own = torch.tensor([len(row) for row in rows], dtype=torch.int32, device=accelerator.device)
    lengths = accelerator.gather(own).view(accelerator.num_processes, len(rows)).tolist()  # [rank][row]
    totals = [sum(of_rank) for of_rank in lengths]
    flat = torch.zeros(max(totals), dtype=torch.int32, device=accelerator.device)
    flat[: totals[accelerator.process_index]] = torch.cat(rows).to(flat)
    tokens = accelerator.gather(flat).view(accelerator.num_processes, -1).cpu()
    return [row for of_rank, one, total in zip(lengths, tokens, totals, strict=True) for row in one[:total].split(of_rank)]


def broadcast_ragged(rows: list[list[int]] | None, count: int, accelerator: Accelerator) -> list[torch.Tensor]:
    """Rank 0's `count` rows as int32 CPU tensors on every rank: lengths first, then one flat tensor.

    Args:
        rows: the token lists on rank 0, ignored elsewhere.
        count: number of rows, known to all ranks.
    """
    lengths = torch.zeros(count, dtype=torch.int32, device=accelerator.device)
    if accelerator.is_main_process:
        lengths.copy_(torch.tensor([len(row) for row in rows], dtype=torch.int32))
    lengths = broadcast(lengths).tolist()
    flat = torch.zeros(sum(lengths), dtype=torch.int32, device=accelerator.device)
    if accelerator.is_main_process:
        flat.copy_(torch.cat([torch.tensor(row, dtype=torch.int32) for row in rows]))
    return list(broadcast(flat).cpu().split(lengths))


def raise_together(error: Exception | None, accelerator: Accelerator) -> None:
    """Raise on every rank what went wrong on rank 0, so that no rank waits in a collective for one that has gone.

    Args:
        error: rank 0's exception or None; ignored on other ranks.

    Raises:
        the exception itself on rank 0, `StoppedByRankZero` elsewhere.
    """
    if accelerator.is_main_process and error is not None:
        broadcast_object_list([f"{type(error).__name__}: {error}"])
        raise error
    message = broadcast_object_list([None])[0]
    if message is not None:
        raise StoppedByRankZero(message)
