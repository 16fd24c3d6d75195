"""A gap that says "another policy" stops the run, one that looks odd is told, and noise is only logged."""

import dataclasses
import math

import pytest
import torch

from justrl_trl.errors import ServerError
from justrl_trl.rollouts.client import RolloutClient
from justrl_trl.rollouts.pool import RolloutPool
from justrl_trl.weights.gap import Gap, check_rollouts, differing, make_probe, widest
from tests.unit.fake_server import FakeServer
from tests.unit.rollouts.test_client import COMPLETIONS, MODELS, SAMPLING

ONE_EACH = dataclasses.replace(SAMPLING, n=1, max_tokens=3)


def test_a_gap_is_the_largest_the_mean_and_the_k3_of_the_differences():
    gap = Gap.between(torch.tensor([-1.0, -2.5, -3.0]), torch.tensor([-1.0, -2.0, -3.2]))
    assert gap.largest == pytest.approx(0.5) and gap.mean == pytest.approx(0.7 / 3)
    assert gap.k3 == pytest.approx((math.exp(-0.5) - 1 + 0.5 + math.exp(0.2) - 1 - 0.2) / 3, rel=1e-5)


def test_the_widest_of_several_is_that_of_each_figure():
    assert widest([Gap(0.2, 0.04, 0.001), Gap(0.1, 0.05, 0.002)]) == Gap(0.2, 0.05, 0.002)
    for order in (1, -1):
        assert math.isnan(widest([Gap(math.nan, math.nan, math.nan), Gap(0.1, 0.05, 0.002)][::order]).mean)


def test_a_push_that_arrived_everywhere_leaves_nothing_to_say():
    assert differing({"http://a": Gap(0.2, 0.04, 0.001), "http://b": Gap(0.3, 0.1, 0.001)}, "12", limit=0.1) == {}


@pytest.mark.parametrize("mean", [0.11, math.nan, math.inf])
def test_where_a_push_did_not_arrive_it_says_how_far_apart_they_are(mean):
    wrong = differing({"http://a": Gap(0.2, 0.04, 0.001), "http://b": Gap(2.0, mean, 0.5)}, "12", limit=0.1)
    assert list(wrong) == ["http://b"]
    assert "version 12 it disagrees" in wrong["http://b"] and f"{mean:.3f} on average" in wrong["http://b"]
    assert "sync_logprob_gap_limit=0.1." in wrong["http://b"]


def rollouts(*means: float) -> tuple[dict[str, float], list[str]]:
    said = []
    gaps = {f"http://{number}": Gap(3 * mean, mean, mean**2) for number, mean in enumerate(means)}
    return check_rollouts(gaps, 8, warning=0.05, limit=0.5, say=said.append), said


def test_noise_between_trainer_and_servers_is_logged_and_nothing_is_said():
    metrics, said = rollouts(0.04, 0.05)
    assert said == []
    assert metrics == {
        "rollout/logprob_gap_max": pytest.approx(0.15),
        "rollout/logprob_gap_mean": 0.05,
        "rollout/logprob_kl": pytest.approx(0.0025),
    }


def test_a_gap_beyond_the_warning_is_told_with_its_server_and_the_run_goes_on():
    metrics, said = rollouts(0.01, 0.5)
    assert metrics["rollout/logprob_gap_mean"] == 0.5
    assert said == [
        "warning: trainer and server differ: http://1 by 0.500 in log-probability, on average over its share of 8 responses > "
        "gap_warning=0.05"
    ]


@pytest.mark.parametrize("mean", [0.51, math.nan])
def test_a_gap_beyond_the_limit_stops_the_run_and_names_the_server(mean):
    with pytest.raises(ServerError, match=rf"differ: http://1 by {mean:.3f} .* share of 8 responses > gap_limit=0\.5"):
        rollouts(0.04, mean)


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
