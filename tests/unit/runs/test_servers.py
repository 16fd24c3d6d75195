"""Ranks wait for rank 0's servers longer than one collective may take, and hear of it when they do not come."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

# a collective may wait 4 seconds for a rank, and the servers take 10
PROGRAM = """
import sys, time
from datetime import timedelta
from accelerate import PartialState
from justrl_trl import distributed
from justrl_trl.background import Background
from justrl_trl.errors import JustRLError, ServerError
from justrl_trl.runs.servers import wait_for_servers

distributed.PATIENCE_SECONDS = 1.0
state = PartialState(cpu=True, backend="gloo", timeout=timedelta(seconds=4))

def connect():
    time.sleep(10)
    if sys.argv[1] == "fails":
        raise ServerError("no server answered")
    return lambda: "a pool, which cannot be pickled"

connecting = Background(connect) if state.is_main_process else None
try:
    pool = wait_for_servers(connecting, state)
    print(f"rank {state.process_index}: {pool and pool()}", flush=True)
except JustRLError as error:
    print(f"rank {state.process_index}: {type(error).__name__}: {error}", flush=True)
distributed.leave_together()
"""


def on_two_ranks(tmp_path: Path, how: str) -> list[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run([*launcher, str(program), how], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))


def test_servers_may_take_longer_than_a_collective_may_wait(tmp_path):
    assert on_two_ranks(tmp_path, "comes") == ["rank 0: a pool, which cannot be pickled", "rank 1: None"]


def test_servers_that_do_not_come_are_told_on_every_rank(tmp_path):
    first, second = on_two_ranks(tmp_path, "fails")
    assert first == "rank 0: ServerError: no server answered"
    assert second.startswith("rank 1: StoppedByRankZero:") and "no server answered" in second
