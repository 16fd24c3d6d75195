"""Whatever fails, on whatever rank: words, once, and an exit status that is not 0; only errors of ours lose their traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys, time
from accelerate import PartialState
from justrl_trl.errors import ConfigError, DataError, ServerError, StoppedByRankZero
from justrl_trl.terminal import report_errors

failing, what = sys.argv[1:]
with report_errors():
    state = PartialState(cpu=True, backend="gloo")
    if failing == "all" or int(failing) == state.process_index:
        raise eval(what)
    if what.startswith("ServerError") and state.process_index:
        raise StoppedByRankZero("as rank 0 says")
    time.sleep(60)  # in a collective, which the launcher ends
"""


def on_two_ranks(tmp_path, failing: str, what: str, **environment: str) -> subprocess.CompletedProcess:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        [*launcher, str(program), failing, what], capture_output=True, text=True, timeout=120, env=env, cwd=ROOT, check=False
    )


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_of_ours_is_one_paragraph_from_the_rank_that_has_it(tmp_path, rank):
    done = on_two_ranks(tmp_path, rank, 'DataError("row 7 has no answer")')
    where = " on rank 1" if rank == "1" else ""
    assert done.returncode != 0
    assert done.stderr.count(f"error{where}: row 7 has no answer") == 1
    assert "raise eval(what)" not in done.stderr  # no traceback of ours


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_that_is_not_ours_keeps_its_traceback_after_one_line_that_says_what_to_do(tmp_path, rank):
    done = on_two_ranks(tmp_path, rank, 'ZeroDivisionError("in the reward")')
    assert done.returncode != 0
    assert done.stderr.count(f"unexpected ZeroDivisionError on rank {rank}: please report it") == 1
    assert "--resume_from_checkpoint True goes on" in done.stderr
    said = done.stderr
    assert (
        said.index("unexpected ZeroDivisionError")
        < said.index("raise eval(what)")
        < said.index("ZeroDivisionError: in the reward")
    )


def test_a_value_error_of_a_library_is_no_error_of_ours(tmp_path):
    done = on_two_ranks(tmp_path, "1", 'ValueError("invalid literal")')
    assert "unexpected ValueError on rank 1" in done.stderr and "raise eval(what)" in done.stderr


def test_an_error_that_all_ranks_have_is_printed_once(tmp_path):
    done = on_two_ranks(tmp_path, "all", 'ConfigError("epsilon=-1 is refused")')
    assert done.returncode != 0 and done.stderr.count("epsilon=-1 is refused") == 1


def test_other_ranks_do_not_repeat_rank_0s_error(tmp_path):
    done = on_two_ranks(tmp_path, "0", 'ServerError("no server is left")')
    assert done.stderr.count("no server is left") == 1 and "as rank 0 says" not in done.stderr


def test_the_traceback_of_an_error_of_ours_is_there_for_who_asks(tmp_path):
    done = on_two_ranks(tmp_path, "0", 'ConfigError("epsilon=-1 is refused")', JUSTRL_TRACEBACK="1")
    assert done.returncode != 0 and "raise eval(what)" in done.stderr
