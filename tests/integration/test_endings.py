"""However a run ends, nothing of it stays: no process, no port; and a dead server is an error, not a hang."""

import os
import signal
import time

import psutil
import pytest

from justrl_trl.jsonl import read_jsonl

from .conftest import MODEL_PROCESS, RANKS, start

pytestmark = pytest.mark.timeout(900)


def wait_until(condition, seconds: float, what: str):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.5)
    pytest.fail(f"{what} did not happen within {seconds} s")


def training(launch, tmp_path, *options: str, ranks: int = RANKS):
    """A launch that has finished its first rollout step."""
    run = launch("--output_dir", tmp_path / "run", "--heldout_generations", "1", *options, ranks=ranks)
    wait_until(lambda: "rollout step  1/" in run.output() or run.process.poll() is not None, 400, "the first rollout step")
    assert run.process.poll() is None, run.output()[-4000:]
    return run


def rank_processes(run) -> list[psutil.Process]:
    return [p for p in run.alive() if "grpo_justrl.py" in " ".join(p.cmdline()) and p.environ().get("RANK")]


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm to the launcher", "kill -9 of a rank"])
def test_an_interrupted_run_leaves_nothing_behind(launch, tmp_path, how):
    run = training(launch, tmp_path)
    assert len(rank_processes(run)) == RANKS and any("api_server" in " ".join(p.cmdline()) for p in run.alive())
    assert any(p.name().startswith(MODEL_PROCESS) for p in run.alive()), "the test would not see a worker that stays"
    if how == "ctrl-c":
        os.killpg(run.process.pid, signal.SIGINT)
    elif how == "sigterm to the launcher":  # what a scheduler sends
        run.process.terminate()
    else:
        next(p for p in rank_processes(run) if p.environ()["RANK"] == str(RANKS - 1)).kill()
    assert run.wait(90) != 0
    wait_until(lambda: not run.alive(), 30, f"the end of {[p.name() for p in run.alive()]}")


def test_a_killed_managed_server_is_started_again_and_the_run_goes_on(launch, tmp_path):
    """Killed is its guard, the harder case: the kernel and vLLM's own processes must clear the port without it. Ranks score
    while it samples."""
    overlap = ("--score_while_sampling", "True", "--max_tokens_per_micro_batch", "1024")
    run = training(launch, tmp_path, "--num_rollout_steps", "12", "--warmup_rollout_steps", "0", *overlap)
    next(p for p in run.alive() if "servers.guard" in " ".join(p.cmdline())).kill()
    assert run.wait(400) == 0, run.output()[-4000:]
    assert "is started again" in run.output() and "rollout step 12/12" in run.output()
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all(row["seconds/overlapped_scoring"] > 0 for row in rows)
    assert len(rows) == 12 and max(row["sync/logprob_gap_mean"] for row in rows) < 0.05  # never on the checkpoint's weights
    wait_until(lambda: not run.alive(), 30, "the end of everything")


def test_with_every_given_server_gone_the_run_saves_and_says_so(launch, base, tmp_path, monkeypatch):
    monkeypatch.setenv("JUSTRL_SERVER_KEY", "one for all of them")
    servers = [start(base, tmp_path / f"server_{core}.log", core) for core in range(2)]
    try:
        for server in servers:
            server.wait(600)
        addresses = ["--rollout_servers", *(server.url for server in servers)]
        run = training(launch, tmp_path, "--server_wait", "6", "--server_heartbeat_timeout", "5", *addresses)
        for server in servers:
            for process in psutil.Process(server.pid).children(recursive=True):
                process.kill()
        assert run.wait(200) != 0
    finally:
        for server in servers:
            server.stop()
    output = run.output()
    assert "error: No rollout server came back within 6 s." in output and servers[1].url in output
    assert "waiting, 6 s to go" in output and "--resume_from_checkpoint True goes on from it" in output
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert int(checkpoint.name.split("-")[1]) % 4 == 0 and list(checkpoint.glob("*.safetensors"))
    wait_until(lambda: not run.alive(), 30, "the end of everything")
