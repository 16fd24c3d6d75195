"""A run starts with the servers that are there; one that comes later must be what the others are."""

import socket
import threading
import time

import pytest

from justrl_trl.config import JustRLConfig
from justrl_trl.errors import ServerError
from justrl_trl.rollouts.pool import DOWN, STALE
from justrl_trl.runs.servers import connect
from tests.unit.fake_server import FakeServer
from tests.unit.rollouts.test_pool import wait


def serving(model: str = "org/model", dtype: str = "torch.bfloat16"):
    """What a real server answers to what is asked before a run."""
    config = {
        "model_config": {"model": model, "max_model_len": 4096, "dtype": dtype},
        "weight_transfer_config": {"backend": "justrl_gloo"},
    }

    def answer(method, path, body):
        if path.startswith("/server_info"):
            return 200, {"vllm_config": config}
        return 200, {"weight_version": "default"}

    return answer


@pytest.fixture
def run(tmp_path):
    """`run(*urls)`: the pool of a run on these servers."""
    pools = []

    def start(*urls: str, seconds: float = 1.0):
        training = JustRLConfig(
            output_dir=str(tmp_path),
            generation_batch_size=8,
            max_prompt_length=64,
            max_completion_length=64,
            rollout_servers=list(urls),
            vllm_server_timeout=seconds,
            server_heartbeat_timeout=1.0,
        )
        pools.append(connect("org/model", training, []))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_all_servers_are_waited_for(run):
    there, later = FakeServer(serving()), free_address()
    started: list[FakeServer] = []
    threading.Timer(1.5, lambda: started.append(FakeServer(serving(), port=int(later.rpartition(":")[2])))).start()
    assert [member.state for member in run(there.url, later, seconds=30).members] == [STALE, STALE]
    there.close(), started[0].close()


def test_a_server_that_is_down_at_the_start_is_left_out(run, capsys):
    there, gone = FakeServer(serving()), free_address()
    pool = run(there.url, gone)
    assert [member.state for member in pool.members] == [STALE, DOWN]
    assert f"rollout server {gone} is out" in (output := capsys.readouterr().out)
    assert "The work starts without it" in output
    there.close()


def test_with_no_server_at_all_the_run_does_not_start(run):
    first, second = free_address(), free_address()
    with pytest.raises(ServerError, match=rf"within vllm_server_timeout=1 s: {first}.* cannot be reached.*{second}.*serve\.py"):
        run(first, second)


def test_a_wrong_server_is_refused_at_once_whatever_the_others_do(run):
    wrong = FakeServer(serving(model="org/other"))
    started = time.monotonic()
    with pytest.raises(ServerError, match="serves 'org/other', and 'org/model' is needed"):
        run(free_address(), wrong.url, seconds=30)
    assert time.monotonic() - started < 5
    wrong.close()


@pytest.mark.parametrize("fits", [True, False])
def test_a_server_that_comes_later_is_checked_before_it_is_used(run, capsys, fits):
    there, gone = FakeServer(serving()), free_address()
    pool = run(there.url, gone)
    pool._heartbeat = 0.05
    pool.current(pool.members[:1], "1")
    late = FakeServer(serving() if fits else serving(model="org/other"), port=int(gone.rpartition(":")[2]))
    if fits:
        wait(lambda: pool.members[1].state == STALE, seconds=8)  # waits for a push
    else:
        wait(lambda: "serves 'org/other'" in pool.members[1].why, seconds=8)
        assert pool.members[1].state == DOWN
        assert capsys.readouterr().out.count("serves 'org/other'") == 1  # said once, not at every probe
    there.close(), late.close()
