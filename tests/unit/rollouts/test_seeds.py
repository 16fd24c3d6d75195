"""No two responses of a run are sampled from the same random numbers, however requests and their responses are numbered."""

from types import SimpleNamespace

import pytest

from justrl_trl.config import JustRLConfig
from justrl_trl.rollouts.seeds import SEEDS, request_seeds, seed_for
from justrl_trl.training.sampling import sampling_of


def seeds_in_vllm(base: int, requests: int, n: int) -> list[int]:
    """Seed of every response: vLLM's `ParentRequest` adds the number of the response to the seed of its request."""
    return [seed + child for seed in request_seeds(base, requests, n) for child in range(n)]


@pytest.mark.parametrize("base", [0, 1, 2**31 - 2048, seed_for(1, "rollouts")])
def test_the_2048_responses_of_a_rollout_step_have_2048_seeds(base):
    assert len(set(seeds_in_vllm(base, 256, 8))) == 2048


def test_seeds_of_requests_stay_within_31_bits():
    assert request_seeds(2**31 - 6, 3, 4) == [2**31 - 6, 2**31 - 2, 2]
    assert all(0 <= seed_for("x", number) < SEEDS for number in range(1000))


def seed_at(rollout_step: int, what: str = "rollouts", **options) -> int:
    """First seed of the requests that the trainer makes for that purpose at that rollout step."""
    trainer = SimpleNamespace(args=JustRLConfig(use_cpu=True, **options), rollout_step=rollout_step, eos_token_ids=[0])
    return sampling_of(trainer, 8, 100, what).seed


def test_no_seed_comes_twice_in_a_run_with_everything_that_it_samples():
    seen = []
    for rollout_step in (*range(20), 4378, 4379):
        base = seed_at(rollout_step)
        seen += seeds_in_vllm(base, 256, 8)
    seen += seeds_in_vllm(seed_at(0, "held out"), 500, 4)
    seen += seeds_in_vllm(seed_at(0, "probe"), 4, 1)
    assert len(set(seen)) == len(seen)


def test_runs_whose_seeds_differ_by_one_share_none():
    one, other = (set(seeds_in_vllm(seed_at(0, seed=seed), 256, 8)) for seed in (1, 2))
    assert not one & other


def test_a_seed_depends_on_everything_that_it_is_for_and_on_nothing_else():
    names = [(1, "a", 2, 3), (2, "a", 2, 3), (1, "b", 2, 3), (1, "a", 3, 3), (1, "a", 2, 4), (1, "a", 23)]
    assert len({seed_for(*name) for name in names}) == len(names)
    assert seed_for(1, "a", 2, 3) == 878761964  # the same in every process and on every machine
