"""Terminal behaviour of every script: report errors, silence libraries, print on rank 0."""

import contextlib
import os
import sys
import time
import traceback
import warnings
from typing import NoReturn

import torch
import transformers
from accelerate.state import PartialState

from justrl_trl.distributed import leave
from justrl_trl.errors import JustRLError, StoppedByRankZero

_RANK_ZERO_SECONDS = 3.0  # the launcher ends all ranks when the first one exits: let rank 0 print first


@contextlib.contextmanager
def report_errors():
    """End the process with a status that is not 0, and with words, on whatever rank it fails.

    An error raised on purpose (`JustRLError`) is one paragraph and status 2. Any other exception keeps its traceback, after one
    line that says what to do, and has status 1. An error that all ranks share is printed once: the others wait for rank 0.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        yield
    except KeyboardInterrupt:
        if rank == 0:
            print("\ninterrupted. --resume_from_checkpoint True goes on from the last checkpoint, if there is one.", flush=True)
        _exit(130)
    except JustRLError as error:
        if os.environ.get("JUSTRL_TRACEBACK"):
            raise
        _wait_for_rank_zero(rank)
        if not isinstance(error, StoppedByRankZero):
            where = f" on rank {rank}" if rank else ""
            print(f"\nerror{where}: {error}\n(JUSTRL_TRACEBACK=1 shows where.)", file=sys.stderr, flush=True)
        _exit(2)
    except Exception as error:
        _wait_for_rank_zero(rank)
        print(
            f"\nunexpected {type(error).__name__} on rank {rank}: please report it with the traceback below. "
            "--resume_from_checkpoint True goes on from the last checkpoint, if there is one.",
            file=sys.stderr,
        )
        traceback.print_exc()
        _exit(1)


def _wait_for_rank_zero(rank: int) -> None:
    if rank:
        time.sleep(_RANK_ZERO_SECONDS + 0.1 * rank)  # one after another: the first one that exits ends the others


def _exit(status: int) -> NoReturn:
    if torch.distributed.is_initialized():
        leave(status)  # an abort in the interpreter's teardown would replace the status
    sys.stdout.flush()
    sys.exit(status)


def quiet_libraries() -> None:
    """Silence warnings of other libraries that repeat on every rank or that the user cannot act on."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed calls old names
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator")
    transformers.utils.logging.disable_progress_bar()
    if int(os.environ.get("RANK", 0)):
        transformers.utils.logging.set_verbosity_error()


def say(lines: list[str]) -> None:
    """Print on rank 0."""
    if PartialState().is_main_process:
        print("\n".join(lines), flush=True)


class Waiting:
    """Prints how long something has been waited for, every 15 seconds.

    Args:
        what: what is being waited for.
    """

    def __init__(self, what: str):
        self._what, self._next = what, 0.0

    def __call__(self, seconds: float) -> None:
        if seconds >= self._next:
            self._next = seconds + 15
            print(f"{self._what}: {seconds:.0f} s", flush=True)
