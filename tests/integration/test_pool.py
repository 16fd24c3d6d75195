"""Two real servers and what can happen to them: every generation ends with the right rollouts, and the weights stay right."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid

import psutil
import pytest
import requests
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from justrl_trl.rollouts.client import RolloutClient
from justrl_trl.rollouts.dispatch import Rollouts, generate
from justrl_trl.rollouts.pool import DOWN, LIVE, STALE, AllServersDown, RolloutPool, WeightsNeeded
from justrl_trl.weights.sync import WeightSync
from tests.unit.fake_server import FakeServer

from .conftest import ON_PATH, pool_of, start
from .test_server import IDS, gap_of, sampling, trainer_logps

pytestmark = pytest.mark.timeout(900)

PROMPTS = [[5 + i % 40, 6, 7 + i % 30] for i in range(24)]
LONG = sampling(n=4, max_tokens=200)


@pytest.fixture(scope="module")
def processes(base, tmp_path_factory):
    """Two servers of the tiny base, a core each, with one key."""
    logs = tmp_path_factory.mktemp("pair")
    patch = pytest.MonkeyPatch()
    patch.setenv("JUSTRL_SERVER_KEY", uuid.uuid4().hex)
    pair = [start(base, logs / f"{i}.log", core=i) for i in range(2)]
    patch.undo()
    try:
        for server in pair:
            server.wait(600)
        yield pair
    finally:
        for server in pair:
            server.stop()


@pytest.fixture
def pair(processes):
    """A pool of both, healthy, on the same weights; whatever the last test did to them is undone."""
    for server in processes:
        if server.ended:
            server.restart()
    for server in processes:
        server.wait(600)
    pool = pool_of(processes, heartbeat_timeout=5.0)
    pool.current([], "none")
    yield pool
    pool._closed.set()


@pytest.fixture
def model(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def sync_of(model, pool: RolloutPool, timeout_seconds: float = 30) -> WeightSync:
    return WeightSync(Accelerator(cpu=True), model, pool, address="127.0.0.1", port=0, timeout_seconds=timeout_seconds)


def family(process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def right(responses: list[list[int]]) -> bool:
    return len(responses) == len(PROMPTS) * LONG.n and all(1 <= len(ids) <= LONG.max_tokens for ids in responses)


def wait(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_after_twenty_updates_the_servers_hold_the_trainers_weights(request, tmp_path, kind, dtype):
    """bfloat16: two servers, untied; the others one each. float32 on both sides leaves rounding alone."""
    path = request.getfixturevalue("base" if kind == "untied" else "tied_model")
    if dtype == "bfloat16":
        pool = request.getfixturevalue("pair") if kind == "untied" else request.getfixturevalue("servers")["tied"]
        own = []
    else:
        own = [start(path, tmp_path / "server.log", core=0, dtype=dtype)]
        own[0].wait(600)
        pool = pool_of(own)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        sync = sync_of(model, pool)
        for version in range(20):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.005)
            sync.push(f"{kind}-{dtype}-{version}")
        logps = trainer_logps(model, IDS)
        for member in pool.members:
            assert member.state == LIVE and member.client.weight_version() == f"{kind}-{dtype}-19"
            gap = max(abs(a - b) for a, b in zip(member.client.prompt_logprobs(IDS), logps.tolist(), strict=True))
            assert gap <= (0.1 if dtype == "bfloat16" else 1e-3), gap
    finally:
        for server in own:
            server.stop()


def test_both_servers_work_and_give_the_samples_that_one_would(pair, model):
    sync_of(model, pair).push("1")
    both = generate(pair, PROMPTS, LONG)
    assert right(both) and all(member.prompts > 0 for member in pair.members)
    alone = pair.members[0].client
    assert [alone.sample(PROMPTS[i], LONG, LONG.seed + i * LONG.n) for i in (0, 7)] == [both[0:4], both[28:32]]


def test_a_stopped_server_is_noticed_by_the_heartbeat(pair, model, processes):
    sync_of(model, pair).push("1")
    stopped = family(processes[1])
    threading.Timer(0.7, lambda: [p.send_signal(signal.SIGSTOP) for p in stopped]).start()
    try:
        started = time.monotonic()
        assert right(generate(pair, PROMPTS * 2, LONG)[: len(PROMPTS) * LONG.n])
        assert time.monotonic() - started < 60, "the deadline of a request is 120 s"
    finally:
        for process in stopped:
            process.send_signal(signal.SIGCONT)
    wait(lambda: pair.members[1].state == LIVE, 30, "it goes on with current weights, without a push")


def test_a_trainer_that_dies_in_a_push_leaves_servers_that_the_next_one_can_use(pair, model):
    sync = sync_of(model, pair, timeout_seconds=5)
    sync.push("1")
    for member in pair.members:
        member.client.start_weight_update()  # and then nothing comes: an open update on both
    assert right(generate(pair, PROMPTS, LONG)), "an open update stops nobody"
    sync_of(model, pair).push("2")  # knows nothing of the first one
    assert [m.client.weight_version() for m in pair.members] == ["2", "2"]


DYING_TRAINER = """
import sys, time
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from justrl_trl.rollouts.client import RolloutClient
from tests.integration.test_pool import sync_of
from justrl_trl.rollouts.pool import RolloutPool

base, marker, *urls = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
pool = RolloutPool([RolloutClient(url) for url in urls])
sync = sync_of(model, pool)
sync.push("before")
stream = sync._weights._stream
def slowly():
    for number, pair in enumerate(stream()):
        if number == 5:
            Path(marker).touch()
            time.sleep(600)
        yield pair
sync._weights._stream = slowly
with torch.no_grad():
    model.lm_head.weight.add_(1.0)
sync.push("broken")
"""


def test_a_trainer_killed_in_the_middle_of_a_push_leaves_servers_that_the_next_one_can_use(
    pair, model, base, processes, tmp_path
):
    """kill -9 with some of the weights sent: both servers still have what they had, and take the next trainer's."""
    marker = tmp_path / "half way"
    env = {**os.environ, "JUSTRL_SERVER_KEY": processes[0].key, **ON_PATH}
    urls = [server.url for server in processes]
    trainer = subprocess.Popen([sys.executable, "-c", DYING_TRAINER, str(base), str(marker), *urls], env=env)
    try:
        wait(lambda: marker.exists() or trainer.poll() is not None, 120, "the push begins")
        assert trainer.poll() is None
    finally:
        trainer.kill()
        trainer.wait()
    pair.current(pair.members, "before")
    assert [m.client.weight_version() for m in pair.members] == ["before", "before"]
    for member in pair.members:
        assert member.client.paused()  # by the trainer that is gone
        member.client.resume()
    assert right(generate(pair, PROMPTS, LONG)), "half a push changes nothing"
    for member in pair.members:
        member.client.pause()
    sync = sync_of(model, pair)
    sync.push("2")
    assert [m.client.weight_version() for m in pair.members] == ["2", "2"]
    assert right(generate(pair, PROMPTS, LONG))
    logps = trainer_logps(model, IDS).tolist()
    for member in pair.members:
        assert max(abs(a - b) for a, b in zip(member.client.prompt_logprobs(IDS), logps, strict=True)) < 0.1


class Proxy:
    """Between a client and a real server: every `every`-th completion is answered 500, or cut in the middle."""

    def __init__(self, url: str, key: str, fault: str, every: int = 3):
        self.count = 0

        def answer(method, path, body):
            real = requests.request(method, url + path, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=120)
            if path == "/v1/completions":
                self.count += 1
                if self.count % every == 0:
                    return (500, {"error": "proxy"}) if fault == "500" else (200, real.content[: len(real.content) // 2])
            return real.status_code, real.content

        self.fake = FakeServer(answer)


@pytest.mark.parametrize("fault", ["500", "truncated"])
def test_a_server_that_answers_errors_now_and_then_only_costs_time(pair, model, processes, fault):
    sync_of(model, pair).push("1")
    proxy = Proxy(processes[0].url, processes[0].key, fault)
    clients = [RolloutClient(proxy.fake.url, processes[0].key), pair.members[1].client]
    pool = RolloutPool(clients, heartbeat_seconds=0.2, say=lambda line: None)
    pool.current(pool.members, "1")
    try:
        assert right(generate(pool, PROMPTS, LONG))
        assert pool.members[0].failures >= 1 and pool.members[0].prompts >= 1
        assert generate(pool, PROMPTS[:4], LONG) == generate(pair, PROMPTS[:4], LONG)
    finally:
        pool._closed.set()
        proxy.fake.close()


@pytest.mark.cpu_only("cores")
def test_the_cores_of_two_servers_are_two(processes):
    if len(os.sched_getaffinity(0)) > 1:
        assert processes[0].spec.core != processes[1].spec.core


# from here on servers die; each that is gone costs the next test the time of a start


def test_a_server_killed_in_a_generation_loses_its_prompts_to_the_other_and_rejoins_by_the_next_push(pair, model, processes):
    sync = sync_of(model, pair)
    sync.push("1")
    threading.Timer(0.7, lambda: [p.kill() for p in family(processes[0])]).start()
    assert right(generate(pair, PROMPTS * 2, LONG)[: len(PROMPTS) * LONG.n])
    assert pair.members[0].state == DOWN and pair.members[1].state == LIVE
    wait(lambda: processes[0].ended, 20, "the guard ends with its server")
    processes[0].restart()
    wait(lambda: pair.members[0].state == STALE, 120, "it is back, with the weights of the checkpoint")
    before = pair.members[0].prompts
    assert right(generate(pair, PROMPTS, LONG)) and pair.members[0].prompts == before  # no prompt reaches old weights
    sync.push("2")
    assert [m.client.weight_version() for m in pair.members] == ["2", "2"]
    assert right(generate(pair, PROMPTS, LONG)) and pair.members[0].prompts > before
    assert gap_of(sync, trainer_logps(model, IDS)).mean < 0.05


def test_a_server_killed_in_a_push_leaves_the_other_one_current(pair, model, processes):
    sync = sync_of(model, pair, timeout_seconds=20)
    sync.push("1")
    sender, member = sync._sender, pair.members[0]
    original = sender._broadcast

    def killing(weights, receiving):
        for process in family(processes[0]):
            process.kill()
        return original(weights, receiving)

    sender._broadcast = killing
    started = time.monotonic()
    sync.push("2")
    assert time.monotonic() - started < 15, "a server that dies is heard of at once; the deadline is 20 s"
    assert member.state == DOWN and pair.members[1].client.weight_version() == "2"
    assert right(generate(pair, PROMPTS, LONG))
    assert gap_of(sync, trainer_logps(model, IDS)).mean < 0.05


def test_with_all_servers_gone_it_ends_with_a_reason_and_goes_on_when_one_comes_back(pair, model, processes):
    sync = sync_of(model, pair)
    sync.push("1")
    for process in family(processes[0]):  # between push and generation: it costs nothing
        process.kill()
    assert right(generate(pair, PROMPTS, LONG))
    pair.wait_seconds = 3.0
    rollouts = Rollouts(pair, PROMPTS, LONG)
    for process in family(processes[1]):
        process.kill()
    with pytest.raises(AllServersDown, match="http://127.0.0.1.*http://127.0.0.1"):
        rollouts.run()
    wait(lambda: processes[1].ended, 20, "the guard ends")
    processes[1].restart()
    pair.wait_seconds = 120.0
    with pytest.raises(WeightsNeeded):
        rollouts.run()
    sync.push("2")
    rollouts.run()
    assert right(rollouts.responses())
