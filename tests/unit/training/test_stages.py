"""Every second of a rollout step is counted once, in the innermost stage that it was spent in."""

import time
from types import SimpleNamespace

import pytest

from justrl_trl.training.stages import StageClock


def test_a_stage_inside_another_is_not_counted_twice():
    clock = StageClock()
    with clock.stage("scoring"):
        time.sleep(0.05)
        with clock.stage("generation"):
            time.sleep(0.1)
            with clock.stage("sync"):
                time.sleep(0.15)
    assert clock.seconds["scoring"] == pytest.approx(0.05, abs=0.03)
    assert clock.seconds["generation"] == pytest.approx(0.1, abs=0.03)
    assert clock.seconds["sync"] == pytest.approx(0.15, abs=0.03)


def test_a_stage_that_fails_has_taken_its_time():
    clock = StageClock()
    with pytest.raises(ValueError), clock.stage("training"):
        time.sleep(0.02)
        raise ValueError
    assert clock.seconds["training"] >= 0.02


def test_metrics_add_up_and_the_next_rollout_step_begins():
    clock, members = StageClock(), [SimpleNamespace(busy_seconds=0.0) for _ in range(2)]
    pool = SimpleNamespace(members=members, live=lambda: members[:1])
    with clock.stage("generation"):
        time.sleep(0.1)
    members[0].busy_seconds = 0.1
    metrics = clock.metrics(generated=50, trained=50, pool=pool)
    assert metrics["seconds/generation"] + metrics["seconds/training"] <= metrics["seconds/total"]
    assert metrics["tokens_per_second/generation"] == pytest.approx(500, rel=0.2)
    assert metrics["idle/trainer"] == pytest.approx(1.0, abs=0.1)
    assert metrics["idle/servers"] == pytest.approx(0.5, abs=0.1)  # one of two worked all the time
    assert metrics["servers/live"] == 1
    assert clock.metrics(0, 0, pool)["idle/servers"] == 1.0 and not clock.seconds
    assert "idle/servers" not in clock.metrics(0, 0, None)


def test_scoring_inside_generation_takes_no_time_of_its_own_and_is_not_idle():
    clock = StageClock()
    with clock.stage("generation"):
        time.sleep(0.1)
        with clock.stage("overlapped_scoring"):
            time.sleep(0.1)
    metrics = clock.metrics(generated=50, trained=50, pool=None)
    assert metrics["seconds/generation"] == pytest.approx(0.2, abs=0.03) and metrics["seconds/scoring"] == 0
    assert metrics["seconds/overlapped_scoring"] == pytest.approx(0.1, abs=0.03)
    assert metrics["idle/trainer"] == pytest.approx(0.5, abs=0.1)
    assert metrics["tokens_per_second/generation"] == pytest.approx(250, rel=0.2)
