"""Cross-rank helpers: gather and broadcast ragged rows, wait for rank 0, fail together, exit cleanly."""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast, broadcast_object_list

from justrl_trl.errors import StoppedByRankZero

PATIENCE_SECONDS = 60.0  # far below the deadline of a collective (ddp_timeout, half an hour), far above its cost
T = TypeVar("T")


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
    """Raise rank 0's error on every rank, so that no rank waits in a collective for a rank that has left.

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


def on_rank_zero(work: Callable[[], T], accelerator: Accelerator) -> T:
    """Run `work` on rank 0 and return its result on every rank; no collective waits longer than a minute meanwhile.

    Args:
        work: called in a thread; its result is pickled, so keep it small.

    Raises:
        what it raises on rank 0, `StoppedByRankZero` elsewhere.
    """
    outcome: list = [None, None]  # result, error

    def run() -> None:
        try:
            outcome[0] = work()
        except Exception as error:  # raised on all ranks
            outcome[1] = error

    thread = None
    if accelerator.is_main_process:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
    at_it = True
    while at_it:
        if thread is not None:
            thread.join(PATIENCE_SECONDS)
        at_it = bool(broadcast(torch.tensor([thread is not None and thread.is_alive()], device=accelerator.device))[0])
    raise_together(outcome[1], accelerator)
    return broadcast_object_list([outcome[0]])[0]


def leave_together() -> NoReturn:
    """End this rank's process with status 0 once every rank got here: the launcher ends all ranks when one of them fails."""
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
    leave(0)


def leave(status: int) -> NoReturn:
    """End this process without the interpreter's teardown, after joining threads, running exit functions and flushing output.

    A thread of the process group may still hold the tensor of the last collective, and needs the interpreter to release it.
    During teardown that aborts the process with SIGABRT ("terminate called without an active exception"; seen with gloo of
    torch 2.13 in three of eight runs on a busy machine).
    """
    threading._shutdown()  # as multiprocessing does it for its children, which leave in the same way
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
