"""The code of the GPU tests runs: on a CPU, small, so that a minute of a GPU is not lost to a typo."""

import json
import os
import subprocess

import pytest

from .conftest import GPU, ROOT

pytestmark = pytest.mark.timeout(600)


@pytest.mark.cpu_only("a rehearsal of what runs there for real")
def test_the_gpu_check_can_be_rehearsed_on_a_cpu(tmp_path):
    env = {**os.environ, "OUT": str(tmp_path)}
    parts = ["attention", "loss", "training", "benchmark"]  # the server's part is what the other tests of this folder do
    command = ["bash", "tests/gpu/check.sh", "--rehearse", "--only", ",".join(parts)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    written = json.loads((tmp_path / "check.json").read_text())
    assert [(row["name"], row["status"]) for row in written["parts"]] == [(name, "passed") for name in parts]
    assert all(row["figures"] for row in written["parts"]) and not GPU
    assert "proves nothing about a GPU" in done.stdout
