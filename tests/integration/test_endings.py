"""However a run ends, nothing of it stays: no process, no port; and a dead server is an error, not a hang."""

import os
import signal
import time

import psutil
import pytest

pytestmark = pytest.mark.timeout(900)


def wait_until(condition, seconds: float, what: str):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.5)
    pytest.fail(f"{what} did not happen within {seconds} s")


def training(launch, tmp_path, *options: str, ranks: int = 2):
    """A launch that has finished its first rollout step."""
    run = launch("--output_dir", tmp_path / "run", "--heldout_generations", "1", *options, ranks=ranks)
    wait_until(lambda: "rollout step  1/" in run.output() or run.process.poll() is not None, 400, "the first rollout step")
    assert run.process.poll() is None, run.output()[-4000:]
    return run


def rank_processes(run) -> list[psutil.Process]:
    return [p for p in run.alive() if "grpo_justrl.py" in " ".join(p.cmdline()) and p.environ().get("RANK")]


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm to the launcher", "kill -9 of a rank", "kill -9 of the guard"])
def test_an_interrupted_run_leaves_nothing_behind(launch, tmp_path, how):
    run = training(launch, tmp_path)
    assert len(rank_processes(run)) == 2 and any("api_server" in " ".join(p.cmdline()) for p in run.alive())
    assert any(p.name().startswith("VLLM::Worker") for p in run.alive()), "the test would not see a worker that stays"
    if how == "ctrl-c":
        os.killpg(run.process.pid, signal.SIGINT)
    elif how == "sigterm to the launcher":  # what a scheduler sends
        run.process.terminate()
    elif how == "kill -9 of the guard":
        next(p for p in run.alive() if "server_guard" in " ".join(p.cmdline())).kill()
    else:
        next(p for p in rank_processes(run) if p.environ()["RANK"] == "1").kill()
    assert run.wait(90) != 0
    wait_until(lambda: not run.alive(), 30, f"the end of {[p.name() for p in run.alive()]}")


def test_a_dead_server_ends_the_run_with_a_reason(launch, tmp_path):
    run = training(launch, tmp_path, ranks=1)
    run.alive()  # learns the session of the server
    server = [p for p in run.alive() if "api_server" in " ".join(p.cmdline()) and "server_guard" not in " ".join(p.cmdline())]
    assert len(server) == 1
    server[0].kill()
    assert run.wait(120) != 0
    assert "error: http://127.0.0.1" in run.output() and "vllm_server.log" in run.output()
    wait_until(lambda: not run.alive(), 30, "the end of everything")
