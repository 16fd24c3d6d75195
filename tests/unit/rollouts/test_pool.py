"""Whatever servers do, every prompt comes back once, in order, with the seeds it was asked for."""

import resource
import threading
import time

import pytest

from justrl_trl.errors import ServerError
from justrl_trl.rollouts.client import RequestRefused, RolloutClient
from justrl_trl.rollouts.dispatch import Rollouts, generate
from justrl_trl.rollouts.pool import DOWN, LIVE, STALE, AllServersDown, RolloutPool, WeightsNeeded
from tests.unit.fake_server import FakeServer
from tests.unit.rollouts.test_client import COMPLETIONS, SAMPLING, expected, good


class Switchable:
    """A fake server whose behaviour a test changes while it runs."""

    def __init__(self):
        self.version, self.behave, self.lock, self.flying, self.most = "1", good, threading.Lock(), 0, 0
        self.fake = FakeServer(self.answer)

    def answer(self, method, path, body):
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path == "/health":
            return self.behave(method, path, body) if self.behave in (broken, hung) else (200, {})
        if path != COMPLETIONS:
            return good(method, path, body)
        with self.lock:
            self.flying += 1
            self.most = max(self.most, self.flying)
        try:
            return self.behave(method, path, body)
        finally:
            with self.lock:
                self.flying -= 1

    @property
    def asked(self) -> list[int]:
        return [body["prompt"][0] for body in self.fake.bodies(COMPLETIONS)]


@pytest.fixture
def make():
    """`make(2)`: a pool of two switchable servers on current weights; `say` collects what it tells."""
    servers, pools = [], []

    def start(count: int = 1, **options):
        own = [Switchable() for _ in range(count)]
        servers.extend(own)
        told: list[str] = []
        options = {"heartbeat_seconds": 0.05, "heartbeat_timeout": 0.3, "wait_seconds": 5.0} | options
        pool = RolloutPool([RolloutClient(s.fake.url, "k3y", request_seconds=5) for s in own], **options, say=told.append)
        pool.told = told
        pool.current(pool.members, "1")
        pools.append(pool)
        return pool, own

    yield start
    for pool in pools:
        pool.close()
    for server in servers:
        server.fake.close()


PROMPTS = [[10 + i] for i in range(40)]


def broken(method, path, body):
    return 500, {"error": "EngineCore encountered an issue"}


def hung(method, path, body):
    time.sleep(1.5)
    return good(method, path, body) if path == COMPLETIONS else (200, {})


def dies_after(answers: int):
    """Behaviour of a server that gives so many answers and then errors."""
    count = []

    def behave(method, path, body):
        count.append(1)
        return good(method, path, body) if len(count) <= answers else broken(method, path, body)

    return behave


def slow(method, path, body):
    time.sleep(0.05)
    return good(method, path, body)


def test_responses_lie_side_by_side_in_the_order_of_prompts(make):
    pool, _ = make(3)
    assert generate(pool, PROMPTS, SAMPLING) == expected(PROMPTS)


def test_no_prompt_is_no_request(make):
    pool, (server,) = make()
    assert generate(pool, [], SAMPLING) == [] and server.asked == []


def test_prompts_go_to_the_least_loaded_server(make):
    pool, (fast, slower) = make(2, max_num_seqs=6)
    slower.behave = slow
    generate(pool, PROMPTS, SAMPLING)
    assert len(fast.asked) > len(slower.asked) > 0
    assert sorted(fast.asked + slower.asked) == sorted(p[0] for p in PROMPTS)


def test_a_server_gets_no_more_than_it_decodes_at_once_and_a_few(make):
    pool, (server,) = make(max_num_seqs=6)
    server.behave = slow
    generate(pool, PROMPTS, SAMPLING)
    assert 2 <= server.most <= 6 // SAMPLING.n + 2


def test_seeds_belong_to_prompts_and_not_to_servers(make):
    pool, servers = make(2)
    servers[0].behave = broken
    generate(pool, PROMPTS, SAMPLING)
    for server in servers:
        for body in server.fake.bodies(COMPLETIONS):
            assert body["seed"] == SAMPLING.seed + (body["prompt"][0] - 10) * SAMPLING.n


def test_progress_is_told_in_tokens_and_prompts_that_are_left(make):
    pool, _ = make()
    told = []
    generate(pool, [[1], [2, 2]], SAMPLING, lambda tokens, left: told.append((tokens, left)))
    assert sorted(tokens for tokens, _ in told) == [3 * 1 + 6, 3 * 2 + 6] and [left for _, left in told] == [1, 0]


def test_the_longest_prompts_of_last_time_go_first_and_unknown_ones_before_them(make):
    pool, (server,) = make(max_num_seqs=1)
    server.behave = slow
    for prompt, tokens in ([1], 5), ([2], 50), ([3], 500):
        pool.learn_length(prompt, tokens)
    generate(pool, [[1], [2], [3], [4]], SAMPLING)
    assert set(server.asked[:3]) == {4, 3, 2} and server.asked[3] == 1  # three are in flight at a time


@pytest.mark.parametrize("fault", [broken, hung], ids=["answers 500", "hangs"])
def test_a_failing_server_loses_its_prompts_to_another_one(make, fault):
    pool, (bad, other) = make(2)
    bad.behave = fault
    assert generate(pool, PROMPTS, SAMPLING) == expected(PROMPTS)
    assert pool.members[0].state == DOWN and pool.members[1].state == LIVE
    assert any(f"{bad.fake.url} is out" in line for line in pool.told)


@pytest.mark.parametrize(
    "nonsense",
    [b'{"choices": [{"ind', {"choices": []}, {"choices": [{"index": 0, "token_ids": [1]}]}, []],
    ids=["truncated", "no choices", "too few choices", "a list"],
)
def test_nonsense_is_asked_for_again_elsewhere(make, nonsense):
    pool, (bad, _) = make(2)
    bad.behave = lambda method, path, body: (200, nonsense) if path == COMPLETIONS else (200, {})
    assert generate(pool, PROMPTS, SAMPLING) == expected(PROMPTS)
    assert pool.members[0].failures >= 1


def test_nothing_that_was_received_is_asked_for_again(make):
    pool, (bad, other) = make(2, max_num_seqs=6)
    answered = []

    def dies_later(method, path, body):
        if path == COMPLETIONS and len(answered) < 5:
            answered.append(body["prompt"][0])
            return good(method, path, body)
        return broken(method, path, body)

    bad.behave = dies_later
    assert generate(pool, PROMPTS, SAMPLING) == expected(PROMPTS)
    assert answered and not set(answered) & set(other.asked)


def test_a_server_that_recovers_with_current_weights_works_again(make):
    pool, (first, second) = make(2)
    first.behave = broken
    generate(pool, PROMPTS, SAMPLING)
    first.behave = good
    wait(lambda: pool.members[0].state == LIVE)
    before = len(first.asked)
    generate(pool, PROMPTS, SAMPLING)
    assert len(first.asked) > before and any("back with current weights" in line for line in pool.told)


def test_a_server_that_comes_back_with_old_weights_gets_no_prompt(make):
    pool, (first, second) = make(2)
    first.behave = broken
    generate(pool, PROMPTS, SAMPLING)
    first.version, first.behave = "default", good
    wait(lambda: pool.members[0].state == STALE)
    before = len(first.asked)
    assert generate(pool, PROMPTS, SAMPLING) == expected(PROMPTS)
    assert len(first.asked) == before


def test_a_live_server_that_is_found_with_other_weights_gets_no_prompt(make):
    pool, (first, second) = make(2)
    first.version = "default"  # restarted between two probes
    wait(lambda: pool.members[0].state == STALE)
    generate(pool, PROMPTS, SAMPLING)
    assert first.asked == []


def test_during_a_push_versions_mean_nothing(make):
    pool, (server,) = make()
    with pool.update():
        server.version = "2"
        time.sleep(0.3)
        assert pool.members[0].state == LIVE
        pool.current(pool.members, "2")
    time.sleep(0.3)
    assert pool.members[0].state == LIVE


def test_when_only_old_weights_are_left_it_says_so_and_goes_on_after_the_push(make):
    pool, (server,) = make(max_num_seqs=3)
    server.behave = dies_after(5)
    rollouts = Rollouts(pool, PROMPTS, SAMPLING)
    back = threading.Timer(0.5, lambda: (setattr(server, "version", "default"), setattr(server, "behave", good)))
    back.start()
    with pytest.raises(WeightsNeeded, match="prompts are left"):
        rollouts.run()
    left = rollouts.left
    assert 0 < left < 40
    server.version = "2"
    pool.current(pool.members, "2")
    before = len(server.asked)
    rollouts.run()
    assert rollouts.responses() == expected(PROMPTS)
    assert len(server.asked) - before == left  # what had come back was not asked for again


def test_with_no_server_left_it_waits_counts_down_and_gives_up(make):
    pool, (server,) = make(wait_seconds=0.6)
    server.behave = broken
    started = time.monotonic()
    with pytest.raises(AllServersDown, match=r"within 1 s\. http://127.*: down, .*EngineCore"):
        generate(pool, PROMPTS, SAMPLING)
    assert time.monotonic() - started < 4
    assert any("no rollout server is left; waiting, 1 s to go" in line for line in pool.told)


def test_a_request_that_no_server_will_take_ends_at_once_and_costs_no_server(make):
    pool, _ = make(2)
    for server in _:
        server.behave = lambda method, path, body: (400, {"error": "too long"}) if path == COMPLETIONS else (200, {})
    with pytest.raises(RequestRefused, match="too long"):
        generate(pool, PROMPTS, SAMPLING)
    assert [member.state for member in pool.members] == [LIVE, LIVE]


def test_a_prompt_that_kills_every_server_it_meets_does_not_go_round_for_ever(make):
    pool, servers = make(2, wait_seconds=20)

    def poisoned(method, path, body):
        return broken(method, path, body) if path == COMPLETIONS and body["prompt"] == [13] else good(method, path, body)

    for server in servers:
        server.behave = poisoned
    with pytest.raises(ServerError, match=r"Prompt 3 failed 8 times, on every server"):
        generate(pool, PROMPTS, SAMPLING)


def test_a_server_that_hung_is_not_busy_for_ever(make):
    """Its prompts went elsewhere and its answers are never heard; once it is back it must get as many prompts as before."""
    pool, (hanging, other) = make(2, max_num_seqs=6)
    hanging.behave = hung
    generate(pool, PROMPTS, SAMPLING)
    assert [member.in_flight for member in pool.members] == [0, 0]
    hanging.behave = good
    wait(lambda: pool.members[0].state == LIVE)
    before = pool.members[0].prompts
    other.behave = slow
    generate(pool, PROMPTS, SAMPLING)
    assert pool.members[0].prompts > before + 10


def test_a_server_is_probed_again_whatever_its_check_raised(make):
    pool, (first, _) = make(2)
    faults = [KeyError("model_config"), ServerError("another model")]

    def check(client):
        if client.url == first.fake.url and faults:
            raise faults.pop(0)

    pool.require(check)
    pool.lose(pool.members[0], "tried out")
    wait(lambda: pool.members[0].state == LIVE)
    assert any("cannot be checked (KeyError: 'model_config')" in line for line in pool.told) and not faults


def test_a_shell_that_allows_few_files_does_not_limit_the_connections(make):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        make()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_busy_time_counts_when_anything_is_in_flight(make):
    pool, (server,) = make()
    server.behave = slow
    generate(pool, PROMPTS[:4], SAMPLING)
    assert 0.04 < pool.members[0].busy_seconds < 1
    assert pool.members[0].prompts == 4 and pool.members[0].in_flight == 0


def wait(condition, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
