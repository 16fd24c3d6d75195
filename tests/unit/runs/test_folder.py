"""No run overwrites another, a resumed one doubles no line, and the written configuration starts the same run again."""

import json
import re
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from justrl_trl.config import JustRLConfig
from justrl_trl.jsonl import append_jsonl, read_jsonl
from justrl_trl.runs import arguments as run_arguments
from justrl_trl.runs.folder import RunFolder
from justrl_trl.runs.heldout import HeldOut
from justrl_trl.runs.recorder import RecordRun
from justrl_trl.runs.summary import write_summary

TINY = Path(__file__).resolve().parents[3] / "recipes" / "tiny.yaml"


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    assert made.prepare(resume=False) is None
    return made


def test_a_new_run_moves_a_used_folder_aside(folder):
    append_jsonl(folder.metrics, {"rollout_step": 1})
    (folder.path / "checkpoint-4").mkdir()
    moved = folder.prepare(resume=False)
    assert re.fullmatch(r"run-before-\d{8}-\d{6}", moved.name) and moved.parent == folder.path.parent
    assert read_jsonl(moved / "metrics.jsonl") == [{"rollout_step": 1}] and (moved / "checkpoint-4").is_dir()
    assert list(folder.path.iterdir()) == []


def test_a_resumed_run_stays_in_its_folder(folder):
    append_jsonl(folder.metrics, {"rollout_step": 1})
    assert folder.prepare(resume=True) is None
    assert read_jsonl(folder.metrics) == [{"rollout_step": 1}]


def test_a_folder_without_records_is_used_as_it_is(folder):
    (folder.path / "notes.txt").write_text("mine")
    assert folder.prepare(resume=False) is None
    assert (folder.path / "notes.txt").read_text() == "mine"


def test_a_missing_folder_is_made_with_its_parents(tmp_path):
    RunFolder(tmp_path / "a" / "b").prepare(resume=True)
    assert (tmp_path / "a" / "b").is_dir()


def test_cut_drops_every_record_beyond_the_step_and_keeps_the_rest(folder):
    rows = [{"rollout_step": step, "text": "π ≈ 3"} for step in (1, 2, 2, 3, 4)]
    for file in (folder.metrics, folder.samples):
        for row in rows:
            append_jsonl(file, row)
    folder.cut(2)
    for file in (folder.metrics, folder.samples):
        assert read_jsonl(file) == rows[:3]
    assert not folder.heldout.exists()  # nothing is made of nothing
    folder.cut(0)
    assert folder.metrics.read_text() == ""


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_jsonl(path) == []
    rows = [{"text": 'line\nbreak " and \\boxed{5}', "value": 0.1, "none": None}, {"list": [1, 2]}]
    for row in rows:
        append_jsonl(path, row)
    assert read_jsonl(path) == rows
    assert len(path.read_text().splitlines()) == 2


def parse(monkeypatch, *options: str):
    monkeypatch.setattr("sys.argv", ["grpo_justrl.py", *map(str, options)])
    return run_arguments.parse_run(default_recipe=TINY)


def test_written_configuration_starts_the_same_run_again_on_any_number_of_ranks(folder, monkeypatch, ranks):
    run, training, model = parse(monkeypatch, "--seed", "7", "--heldout_size", "16", "--save_rollout_steps", "5")
    folder.write_config(run, training, model)
    again = parse(monkeypatch, "--config", folder.config)
    assert again[0] == run and again[2] == model
    assert again[1].to_dict() == training.to_dict()
    ranks(2)
    shared = parse(monkeypatch, "--config", folder.config)[1]
    assert shared.generation_batch_size == training.generation_batch_size
    assert shared.per_device_train_batch_size * 2 == training.per_device_train_batch_size


def test_written_configuration_holds_no_token(folder, monkeypatch):
    parts = parse(monkeypatch, "--hub_token", "hf_secret")
    assert parts[1].hub_token == "hf_secret"
    folder.write_config(*parts)
    text = folder.config.read_text()
    assert "secret" not in text
    written = yaml.safe_load(text)
    assert not [key for key in written if key.endswith("_token") or key == "token"]
    # a limit in tokens is no token
    assert written["max_tokens_per_micro_batch"] == 4096


def test_written_configuration_states_the_recipe_and_not_what_follows_from_the_ranks(folder, monkeypatch):
    folder.write_config(*parse(monkeypatch))
    written = yaml.safe_load(folder.config.read_text())
    assert written["generation_batch_size"] == 256 and written["num_rollout_steps"] == 40
    assert written["dataset_name"] == "embedded:arithmetic" and written["model_name_or_path"] == "embedded:tiny-base"
    derived = {"per_device_train_batch_size", "max_steps", "save_steps", "logging_steps", "warmup_steps"}
    assert not derived & written.keys()


@pytest.mark.parametrize("record", ["config.yaml", "validation.jsonl", "metrics.jsonl"])
def test_any_record_of_an_earlier_run_is_moved_aside(folder, record):
    (folder.path / record).write_text("old")
    moved = folder.prepare(resume=False)
    assert (moved / record).read_text() == "old" and list(folder.path.iterdir()) == []


class FakeTrainer:
    """What `RecordRun` reads of a trainer: the completion logs of one rollout step, 3 prompts x 2 responses."""

    num_generations = 2

    def __init__(self, accuracies: list[float | None]):
        self._accuracies = list(accuracies)
        prompts = [[{"role": "user", "content": f"p{i // 2}"}] for i in range(6)]
        self._logs = {
            "prompt": deque(prompts),
            "completion": deque([[{"role": "assistant", "content": f"c{i}"}] for i in range(6)]),
            "rewards": {"dapo_reward": deque([1.0, -1.0, 1.0, 1.0, -1.0, -1.0])},
            "advantages": deque([0.7, -0.7, 0.0, 0.0, 0.1, 0.2]),
            "extra": {"solution": deque("556677"), "prediction": deque(["5", None, "6", "6", "8", "9"])},
        }


@pytest.fixture
def recorder(folder):
    made = RecordRun(folder, "org/model")
    made.trainer = FakeTrainer([])
    return made


@pytest.fixture
def heldout(folder, monkeypatch):
    """`heldout(0.25, 0.75)`: a `HeldOut` whose measurements have these results."""
    monkeypatch.setattr("justrl_trl.runs.heldout.heldout_accuracy", lambda trainer: trainer._accuracies.pop(0))

    def make(*accuracies: float | None) -> HeldOut:
        made = HeldOut(folder)
        made.trainer = FakeTrainer(list(accuracies))
        return made

    return make


@pytest.fixture
def args() -> JustRLConfig:
    return JustRLConfig(num_rollout_steps=2, num_completions_to_save=2)


def state(step: int, main: bool = True) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, is_world_process_zero=main)


LOG = {"reward": 0.5, "entropy": 1.0, "completions/mean_length": 9.0, "completions/clipped_ratio": 0.0}


def test_a_run_is_recorded_from_beginning_to_end(folder, recorder, heldout, args):
    seen, before_and_after = [], heldout(0.25, 0.75)
    recorder._on_row = seen.append
    before_and_after.on_train_begin(args, state(0), None)
    recorder.on_train_begin(args, state(0), None)
    recorder.on_log(args, state(4), None, logs=LOG)
    recorder.on_log(args, state(8), None, logs=LOG)
    recorder.on_log(args, state(8), None, logs={"train_runtime": 3.0})  # HF's last word is not a rollout step
    before_and_after.on_train_end(args, state(8), None)
    recorder.on_train_end(args, state(8), None)
    assert seen == read_jsonl(folder.metrics)
    assert [(row["rollout_step"], row["optimizer_step"], row["reward"]) for row in seen] == [(1, 4, 0.5), (2, 8, 0.5)]
    assert read_jsonl(folder.heldout) == [{"rollout_step": 0, "accuracy": 0.25}, {"rollout_step": 2, "accuracy": 0.75}]
    assert folder.figure.exists()


def test_samples_are_one_response_each_of_different_prompts(folder, recorder, args):
    recorder.on_log(args, state(4), None, logs=LOG)
    assert read_jsonl(folder.samples) == [
        {
            "rollout_step": 1,
            "prompt": "p0",
            "completion": "c0",
            "solution": "5",
            "prediction": "5",
            "reward/dapo_reward": 1.0,
            "advantage": 0.7,
        },
        {
            "rollout_step": 1,
            "prompt": "p1",
            "completion": "c2",
            "solution": "6",
            "prediction": "6",
            "reward/dapo_reward": 1.0,
            "advantage": 0.0,
        },
    ]


def test_no_more_samples_than_prompts(recorder):
    assert [sample["completion"] for sample in recorder._samples(99)] == ["c0", "c2", "c4"]
    assert recorder._samples(0) == []


def test_a_resumed_run_forgets_what_it_will_make_again_and_measures_nothing_twice(folder, recorder, heldout, args):
    for step in (1, 2, 3):
        append_jsonl(folder.metrics, {"rollout_step": step})
    append_jsonl(folder.heldout, {"rollout_step": 0, "accuracy": 0.1})
    recorder.on_train_begin(args, state(8), None)  # resumes after rollout step 2
    heldout().on_train_begin(args, state(8), None)
    assert [row["rollout_step"] for row in read_jsonl(folder.metrics)] == [1, 2]
    assert read_jsonl(folder.heldout) == [{"rollout_step": 0, "accuracy": 0.1}]


def test_only_rank_0_writes_but_every_rank_measures(folder, recorder, heldout, args):
    measured = heldout(0.25, 0.75)
    for callback in (measured, recorder):
        callback.on_train_begin(args, state(0, main=False), None)
    recorder.on_log(args, state(4, main=False), None, logs=LOG)
    for callback in (measured, recorder):
        callback.on_train_end(args, state(8, main=False), None)
    assert list(folder.path.iterdir()) == []
    assert measured.trainer._accuracies == []  # sampling held-out problems is a collective


def test_summary_by_hand(folder):
    rewards = [-0.6, -0.4, -0.2, 0.0, 0.3, 0.6]
    for i, reward in enumerate(rewards):
        row = {
            "rollout_step": i + 1,
            "optimizer_step": 4 * (i + 1),
            "reward": reward,
            "entropy": 1.0 + i,
            "completions/mean_length": 10.0 * i,
            "seconds/total": 2.0 + i % 2,
            "tokens_per_second/total": 100.0 * (1 + i % 3),
            "sync/logprob_gap_max": 0.01 * (i + 1),
        }
        append_jsonl(folder.metrics, row)
    append_jsonl(folder.heldout, {"rollout_step": 0, "accuracy": 0.25})
    append_jsonl(folder.heldout, {"rollout_step": 6, "accuracy": 0.5})
    summary = write_summary(folder, seconds=61.26, world_size=2, zero_stage=3)
    assert json.loads(folder.summary.read_text()) == summary
    assert summary == pytest.approx(
        {
            "reward_first": -0.4,  # mean of -0.6, -0.4, -0.2
            "reward_last": 0.3,  # mean of 0, 0.3, 0.6
            "heldout_accuracy_first": 0.25,
            "heldout_accuracy_last": 0.5,
            "rollout_steps": 6,
            "optimizer_steps": 24,
            "entropy_first": 2.0,
            "entropy_last": 5.0,
            "response_length_first": 10.0,
            "response_length_last": 40.0,
            "seconds": 61.3,
            "seconds_per_rollout_step": 2.5,
            "tokens_per_second": 200.0,
            "world_size": 2,
            "zero_stage": 3,
            "sync_logprob_gap_max": 0.06,
        }
    )


def test_summary_of_a_run_that_did_nothing_has_no_numbers_but_is_there(folder):
    append_jsonl(folder.heldout, {"rollout_step": 0, "accuracy": 0.25})
    summary = write_summary(folder, seconds=1, world_size=1, zero_stage=0)
    assert summary["rollout_steps"] == summary["optimizer_steps"] == 0
    assert summary["reward_first"] is summary["sync_logprob_gap_max"] is summary["heldout_accuracy_last"] is None
    assert summary["heldout_accuracy_first"] == 0.25
