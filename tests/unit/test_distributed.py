"""Ragged lists arrive whole and in rank order on every rank, and what rank 0 cannot do, no rank waits for.

The two-rank laws run in two real processes over gloo; one rank takes the same functions without any.
"""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from justrl_trl.distributed import broadcast_ragged, gather_ragged, raise_together


def test_one_rank_gathers_its_own_rows(accelerator):
    rows = [[1, 2], [], [3]]
    assert [row.tolist() for row in gather_ragged([torch.tensor(row) for row in rows], accelerator)] == rows


def test_one_rank_broadcasts_to_itself(accelerator):
    got = broadcast_ragged([[5, 6, 7], [8], []], 3, accelerator)
    assert [row.tolist() for row in got] == [[5, 6, 7], [8], []]


def test_one_rank_raises_what_went_wrong_as_it_was_and_nothing_otherwise(accelerator):
    raise_together(None, accelerator)
    error = OSError("no server")
    with pytest.raises(OSError) as raised:
        raise_together(error, accelerator)
    assert raised.value is error


RANK = """
import json, torch
from accelerate import Accelerator
from justrl_trl.distributed import broadcast_ragged, gather_ragged, leave_together, raise_together

torch.set_num_threads(1)
accelerator, out = Accelerator(cpu=True), {}
rank = accelerator.process_index
rows = {"rows": [[[1, 2, 3], [4]], [[], [151935] * 9]], "short": [[[1]], [[2, 3]]]}
for name, both in rows.items():
    out[name] = [row.tolist() for row in gather_ragged([torch.tensor(row) for row in both[rank]], accelerator)]
sent = [[7, 8], [], [9]] if rank == 0 else None
out["broadcast"] = [row.tolist() for row in broadcast_ragged(sent, 3, accelerator)]
raise_together(None, accelerator)
raise_together(ValueError("mine, and nobody else's business") if rank == 1 else None, accelerator)
try:
    raise_together(KeyError("gone") if rank == 0 else None, accelerator)
except Exception as error:
    out["error"] = [type(error).__name__, str(error)]
print(json.dumps(out))
leave_together()
"""


@pytest.fixture(scope="module")
def two_ranks() -> list[dict]:
    """What each of two processes saw."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_rows_of_two_ranks_are_gathered_in_rank_order_on_both(two_ranks):
    for seen in two_ranks:
        assert seen["rows"] == [[1, 2, 3], [4], [], [151935] * 9]
        assert seen["short"] == [[1], [2, 3]]


def test_rank_0s_rows_reach_both_ranks(two_ranks):
    for seen in two_ranks:
        assert seen["broadcast"] == [[7, 8], [], [9]]


def test_rank_0s_failure_is_raised_on_both_ranks_and_named_on_the_other(two_ranks):
    assert two_ranks[0]["error"] == ["KeyError", "'gone'"]
    name, message = two_ranks[1]["error"]
    assert name == "StoppedByRankZero" and "KeyError: 'gone'" in message


LEAVING = """
import atexit, threading, time, torch
from justrl_trl.distributed import leave_together

class Slow:  # a teardown that takes longer than the thread's matrix product
    def __del__(self, sleep=time.sleep):
        sleep(5)

slow, matrix = Slow(), torch.randn(2500, 2500)
torch.set_num_threads(1)
atexit.register(lambda: print("exit functions were run"))
threading.Thread(target=lambda: (time.sleep(0.5), print("threads were joined"))).start()
threading.Thread(target=lambda: [torch.mm(matrix, matrix) for _ in range(1000)], daemon=True).start()
time.sleep(0.2)
leave_together()  # a normal exit ends here with SIGABRT
"""


def test_a_thread_at_work_in_torch_does_not_abort_a_rank_that_leaves():
    left = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=60)
    assert left.returncode == 0, left.stderr
    assert left.stdout.splitlines() == ["threads were joined", "exit functions were run"]
