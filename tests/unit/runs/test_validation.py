"""Validation measures what it says with sampling of its own, and training does not notice that it was there."""

import json
import random
from pathlib import Path

import numpy
import pytest
import torch

from justrl_trl.data import tiny
from justrl_trl.errors import DataError
from justrl_trl.jsonl import read_jsonl
from justrl_trl.rollouts.client import RolloutClient
from justrl_trl.rollouts.pool import RolloutPool
from justrl_trl.rollouts.seeds import seed_for
from justrl_trl.runs.folder import RunFolder
from justrl_trl.runs.validation import Validate
from tests.side_by_side import Case, build
from tests.unit.fake_server import FakeServer
from tests.unit.rollouts.test_client import COMPLETIONS, MODELS

TOKENIZER = tiny._tokenizer()
PROBLEMS = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(1, 5)]


def answer(method: str, path: str, body: dict | None) -> tuple[int, object]:
    """A server that is right where the seed is even, and runs into the limit where it is divisible by three."""
    if path != COMPLETIONS:
        return 200, MODELS if path == "/v1/models" else {"weight_version": "1"}
    text = TOKENIZER.decode(body["prompt"])
    number = next(i for i in range(1, 5) if f"What is {i} + {i}?" in text)
    ids = TOKENIZER.encode(f"\\boxed{{{2 * number if body['seed'] % 2 == 0 else 99}}}", add_special_tokens=False)
    end = [] if body["seed"] % 3 == 0 else [TOKENIZER.eos_token_id]
    ids += [*[ids[-1]] * (body["max_tokens"] - len(ids))] if not end else end
    return 200, {"choices": [{"index": 0, "token_ids": ids}]}


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return path


@pytest.fixture
def trained(tmp_path, problems):
    """`trained(every)`: what a run of four rollout steps saw, and its folder; without validation where `every` is None."""
    server, pools = FakeServer(answer), []

    def run(every: int | None, **more):
        changes = {
            "validation_benchmarks": str(problems) if every else None,
            "validation_every": every or 1,
            "validation_samples": 3,
            "validation_max_new_tokens": 64,
            "seed": 1,
            **more,
        }
        trainer = build(Case("ours", rollout_steps=4, changes=changes), str(tmp_path / f"run-{every}"))
        trainer.pool = RolloutPool([RolloutClient(server.url, "key")], say=said.append)
        trainer.pool.current(trainer.pool.members, "1")
        pools.append(trainer.pool)
        run.trainers.append(trainer)
        folder = RunFolder(trainer.args.output_dir)
        if every:
            validate = Validate(trainer.args, TOKENIZER, folder)
            validate.trainer = trainer
            trainer.add_callback(validate)
        trainer.train()
        return trainer, folder

    said: list[str] = []
    run.said, run.server, run.trainers = said, server, []
    yield run
    for pool in pools:
        pool.close()
    server.close()


def right(problem: int, sample: int) -> bool:
    """Seeds of the training's seed 1: `answer` is right where they are even."""
    return seed_for(1, "sums", problem, sample) % 2 == 0


def test_validation_runs_before_first_every_n_and_after_last(trained):
    trainer, folder = trained(3)
    rows = read_jsonl(folder.validation)
    assert [(row["rollout_step"], row["benchmark"]) for row in rows] == [(0, "sums"), (3, "sums"), (4, "sums")]
    share = sum(right(p, s) for p in range(4) for s in range(3)) / 12
    assert 0 < share < 1 and all(row["avg"] == pytest.approx(share) for row in rows)
    cut = sum(seed_for(1, "sums", p, s) % 3 == 0 for p in range(4) for s in range(3)) / 12
    assert rows[0]["truncated"] == pytest.approx(cut) and rows[0]["no_box"] == 0
    assert sum(f"sums avg@3 {share:.1%}" in line for line in trained.said) == 3
    logged = [row for row in trainer.state.log_history if "validation/sums/avg@3" in row]
    assert [row["step"] for row in logged] == [0, 12, 16] and logged[0]["validation/sums/avg@3"] == pytest.approx(share)


def test_validation_does_not_change_training(trained):
    with_it, without = (trained(every)[0] for every in (1, None))
    assert len(with_it.seen["gradients"]) == 16
    for one, other in zip(with_it.seen["gradients"], without.seen["gradients"], strict=True):
        assert torch.equal(one, other)
    assert with_it.seen["losses"] == without.seen["losses"]
    for name in ("reward", "entropy", "tokens/trained", "clip_ratio/low_mean", "frac_reward_zero_std"):
        rows = [[row[name] for row in t.seen["metrics"] if "reward" in row] for t in (with_it, without)]
        assert rows[0] == rows[1] and len(rows[0]) == 4, name


def test_validation_leaves_the_trainers_random_state_alone(trained, monkeypatch):
    seen = []
    validate = Validate._validate

    def watched(self, state):
        before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
        validate(self, state)
        after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
        seen.append(torch.equal(before[0], after[0]) and str(before[1:]) == str(after[1:]))

    monkeypatch.setattr(Validate, "_validate", watched)
    trained(2)
    assert seen == [True] * 3


def test_a_validation_that_fails_costs_no_rollout_step(trained, monkeypatch):
    """The rollout step before it is logged and its checkpoint saved by then."""
    grade, count = Validate._grade, []

    def failing(self, sampler):
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("no grading worker starts")
        return grade(self, sampler)

    monkeypatch.setattr(Validate, "_grade", failing)
    with pytest.raises(RuntimeError, match="no grading worker"):
        trained(2, save_rollout_steps=2)
    trainer = trained.trainers[-1]
    assert trainer.state.global_step == 8 and (Path(trainer.args.output_dir) / "checkpoint-8").is_dir()
    assert len([row for row in trainer.seen["metrics"] if "reward" in row]) == 2


def test_a_validated_rollout_step_is_not_validated_again(trained):
    _, folder = trained(2)
    rows = read_jsonl(folder.validation)
    asked = len(trained.server.bodies(COMPLETIONS))
    trainer = trained.trainers[-1]
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Validate):
            callback.on_train_end(trainer.args, trainer.state, trainer.control)
    assert read_jsonl(folder.validation) == rows and len(trained.server.bodies(COMPLETIONS)) == asked


def test_validation_uses_its_own_sampling_settings(trained):
    trained(4)
    for body in trained.server.bodies(COMPLETIONS):
        assert (body["temperature"], body["top_p"], body["max_tokens"], body["n"]) == (0.7, 0.9, 64, 1)
    text = TOKENIZER.decode(trained.server.bodies(COMPLETIONS)[0]["prompt"])
    assert "?\n\nPlease reason step by step" in text  # the training prompt: a blank line, where evaluate.py has a space


def test_validation_time_is_a_separate_stage(trained):
    trainer, _ = trained(1)
    rows = [row for row in trainer.seen["metrics"] if "reward" in row]
    assert len(rows) == 4 and all(0 < row["seconds/validation"] < row["seconds/total"] for row in rows)


def test_a_server_context_that_cannot_hold_it_is_refused_before_anything_starts(tmp_path, problems):
    changes = {"validation_benchmarks": str(problems), "validation_max_new_tokens": 90, "vllm_max_model_length": 110}
    trainer = build(Case("ours", changes=changes), str(tmp_path))
    with pytest.raises(DataError, match=r"A rollout server takes 110 tokens.*max_new_tokens 90"):
        Validate(trainer.args, TOKENIZER, RunFolder(tmp_path))


def test_the_server_context_follows_from_validation(tmp_path, problems):
    """64 + 40 tokens for training; 64 + 500 where validation has 500."""
    plain, validated = (
        build(Case("ours", changes=changes), str(tmp_path)).args.vllm_max_model_length
        for changes in ({}, {"validation_benchmarks": str(problems), "validation_max_new_tokens": 500})
    )
    assert (plain, validated) == (104, 564)
