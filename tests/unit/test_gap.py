"""A gap that says "another policy" stops the run, one that looks odd is told, and noise is only logged."""

import dataclasses
import math

import pytest

from justrl_trl.gap import Gap, check_push, check_rollouts, make_probe
from justrl_trl.pool import RolloutPool
from justrl_trl.rollout import RolloutClient
from justrl_trl.server import ServerError

from .fake_server import FakeServer
from .test_rollout import COMPLETIONS, MODELS, SAMPLING

ONE_EACH = dataclasses.replace(SAMPLING, n=1, max_tokens=3)


def test_a_push_that_arrived_is_logged():
    assert check_push(Gap(0.2, 0.04, 0.001), "12", limit=0.1) == {
        "sync/logprob_gap_max": 0.2,
        "sync/logprob_gap_mean": 0.04,
    }


@pytest.mark.parametrize("mean", [0.11, math.nan, math.inf])
def test_a_push_that_did_not_arrive_stops_the_run_and_says_how_far_apart_they_are(mean):
    with pytest.raises(ServerError, match=rf"version 12 .* {mean:.3f} on average .* sync_logprob_gap_limit=0\.1\."):
        check_push(Gap(2.0, mean, 0.5), "12", limit=0.1)


def rollouts(mean: float) -> tuple[dict[str, float], list[str]]:
    said = []
    return check_rollouts(Gap(3 * mean, mean, mean**2), 8, warning=0.05, limit=0.5, say=said.append), said


def test_noise_between_trainer_and_server_is_logged_and_nothing_is_said():
    metrics, said = rollouts(0.05)
    assert said == []
    assert metrics == {
        "rollout/logprob_gap_max": pytest.approx(0.15),
        "rollout/logprob_gap_mean": 0.05,
        "rollout/logprob_kl": pytest.approx(0.0025),
    }


def test_a_gap_beyond_the_warning_is_told_and_the_run_goes_on():
    metrics, said = rollouts(0.5)
    assert metrics["rollout/logprob_gap_mean"] == 0.5
    assert said == [
        "warning: trainer and server differ by 0.500 in log-probability, on average over 8 responses > gap_warning=0.05"
    ]


@pytest.mark.parametrize("mean", [0.51, math.nan])
def test_a_gap_beyond_the_limit_stops_the_run(mean):
    with pytest.raises(ServerError, match=rf"differ by {mean:.3f} .* over 8 responses > gap_limit=0\.5"):
        rollouts(mean)


@pytest.fixture
def pool_of():
    made = []

    def make(answer) -> RolloutPool:
        server = FakeServer(lambda method, path, body: (200, MODELS) if path == "/v1/models" else answer(path, body))
        pool = RolloutPool([RolloutClient(server.url, "key")], wait_seconds=1.0, say=lambda line: None)
        pool.current(pool.members, "1")
        made.append((pool, server))
        return pool

    yield make
    for pool, server in made:
        pool.close()
        server.close()


def test_the_probe_is_a_response_to_each_prompt(accelerator, pool_of):
    def answer(path, body):
        tokens = [{"index": 0, "token_ids": [body["prompt"][0] + 1] * 3}]
        return 200, {"choices": tokens} if path == COMPLETIONS else {"weight_version": "1"}

    probe = make_probe([[5, 6], [7]], ONE_EACH, pool_of(answer), accelerator)
    assert [(s.ids.tolist(), s.prompt_length) for s in probe] == [([5, 6, 6, 6, 6], 2), ([7, 8, 8, 8], 1)]


def test_a_prompt_that_the_server_refuses_is_the_end_of_the_probe(accelerator, pool_of):
    refusal = lambda path, body: (400, {"error": "too long"}) if path == COMPLETIONS else (200, {"weight_version": "1"})  # noqa: E731
    with pytest.raises(ServerError, match="too long"):
        make_probe([[5]], ONE_EACH, pool_of(refusal), accelerator)
