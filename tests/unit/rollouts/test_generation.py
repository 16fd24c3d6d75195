"""Every response reaches every rank once, in waves while others are sampled, and what goes wrong is told to all."""

import threading

import pytest

from justrl_trl.rollouts import generation
from justrl_trl.rollouts.client import RequestRefused
from justrl_trl.rollouts.dispatch import Rollouts
from justrl_trl.rollouts.generation import Generation
from justrl_trl.rollouts.pool import AllServersDown
from tests.unit.rollouts.test_pool import COMPLETIONS, PROMPTS, SAMPLING, broken, dies_after, expected, good, make  # noqa: F401

NEVER = pytest.fail


def collect(generation: Generation, push=NEVER, give_up=NEVER) -> tuple[list[list[int]], list[tuple[int, bool]]]:
    """All responses in order, and of each wave its size and whether more was to come."""
    rows, waves = {}, []
    for wave, more in generation.waves(push, give_up):
        assert not set(wave) & set(rows)
        rows |= {place: ids.tolist() for place, ids in wave.items()}
        waves.append((len(wave), more))
    return [rows[place] for place in range(len(rows))], waves


def test_without_waves_everything_comes_at_once_in_order(make, accelerator):  # noqa: F811
    pool, _ = make(2)
    rows, waves = collect(Generation(Rollouts(pool, PROMPTS, SAMPLING), SAMPLING.n, None, accelerator))
    assert rows == expected(PROMPTS) and waves == [(len(PROMPTS) * SAMPLING.n, False)]


def test_a_wave_comes_while_others_are_sampled(make, accelerator):  # noqa: F811
    pool, (server,) = make()
    release = threading.Event()

    def last_one_hangs(method, path, body):
        if path == COMPLETIONS and body["prompt"] == PROMPTS[-1]:
            release.wait(10)
        return good(method, path, body)

    server.behave = last_one_hangs
    tokens = 12 * 10  # of ten prompts
    rows, sizes = {}, []
    for wave, more in Generation(Rollouts(pool, PROMPTS, SAMPLING), SAMPLING.n, tokens, accelerator).waves(NEVER, NEVER):
        rows |= {place: ids.tolist() for place, ids in wave.items()}
        sizes.append(len(wave))
        if more and len(rows) >= len(PROMPTS) * SAMPLING.n // 2:
            release.set()  # not before half of it has been seen: it did come early
    assert [rows[place] for place in range(len(rows))] == expected(PROMPTS)
    assert len(sizes) >= 2 and all(size % SAMPLING.n == 0 for size in sizes)


def test_a_wave_holds_no_more_tokens_than_it_may_prompts_included(make, accelerator):  # noqa: F811
    pool, _ = make()
    sizes = []
    for wave, _ in Generation(Rollouts(pool, PROMPTS, SAMPLING), SAMPLING.n, 45, accelerator).waves(NEVER, NEVER):
        # a prompt of one token and its three responses of one to three more than it: (1 + 2) + (1 + 3) + (1 + 4) = 12
        sizes.append(sum(1 + len(ids) for ids in wave.values()))
        assert len(wave) % SAMPLING.n == 0
    assert sum(sizes) == 12 * len(PROMPTS) and max(sizes) <= 45 and sizes.count(36) >= len(sizes) - 1


def test_a_prompt_larger_than_a_wave_is_a_wave_of_its_own(make, accelerator):  # noqa: F811
    pool, _ = make()
    rows, waves = collect(Generation(Rollouts(pool, PROMPTS[:3], SAMPLING), SAMPLING.n, 5, accelerator))
    assert rows == expected(PROMPTS[:3]) and waves == [(3, True), (3, True), (3, False)]


def test_ranks_hear_from_rank_0_however_long_a_response_takes(make, accelerator, monkeypatch):  # noqa: F811
    monkeypatch.setattr(generation, "PATIENCE_SECONDS", 0.3)
    pool, (server,) = make(heartbeat_timeout=5.0)
    told = []
    original = Generation._tell
    monkeypatch.setattr(Generation, "_tell", lambda self, done, state: (told.append(state), original(self, done, state))[1])
    release = threading.Timer(1.5, (event := threading.Event()).set)
    release.start()
    server.behave = lambda method, path, body: (path == COMPLETIONS and event.wait(10), good(method, path, body))[1]
    rows, _ = collect(Generation(Rollouts(pool, PROMPTS, SAMPLING), SAMPLING.n, 10**9, accelerator))
    assert rows == expected(PROMPTS) and len(told) >= 3


def test_servers_that_need_weights_get_them_and_nothing_is_asked_twice(make, accelerator):  # noqa: F811
    pool, (server,) = make(max_num_seqs=3)
    server.behave = dies_after(5)
    threading.Timer(0.5, lambda: (setattr(server, "version", "default"), setattr(server, "behave", good))).start()
    pushed = []

    def push():
        pushed.append(len(server.asked))
        server.version = "2"
        pool.current(pool.members, "2")

    rows, waves = collect(Generation(Rollouts(pool, PROMPTS, SAMPLING), SAMPLING.n, None, accelerator), push=push)
    assert rows == expected(PROMPTS) and len(pushed) == 1
    came = waves[0][0] // SAMPLING.n
    assert 0 < came < 40 and len(server.asked) - pushed[0] == 40 - came


def test_with_no_server_left_it_gives_up_and_says_why(make, accelerator):  # noqa: F811
    pool, (server,) = make(wait_seconds=0.4)
    server.behave, given_up = broken, []
    with pytest.raises(AllServersDown, match="No rollout server came back"):
        collect(
            Generation(Rollouts(pool, PROMPTS, SAMPLING), SAMPLING.n, None, accelerator), give_up=lambda: given_up.append(1)
        )
    assert given_up == [1]


def test_a_refused_prompt_is_raised_and_nothing_is_given_up(make, accelerator):  # noqa: F811
    pool, (server,) = make()
    server.behave = lambda method, path, body: (400, {"error": "too long"}) if path == COMPLETIONS else (200, {})
    with pytest.raises(RequestRefused, match="too long"):
        collect(Generation(Rollouts(pool, PROMPTS, SAMPLING), SAMPLING.n, None, accelerator))
