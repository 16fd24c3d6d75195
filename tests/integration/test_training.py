"""The embedded recipe end to end: two ZeRO-3 ranks, one managed vLLM server, pushes after every rollout step."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from justrl_trl.jsonl import read_jsonl

from .conftest import RANKS

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def run(launch, tmp_path_factory):
    """The whole of `make train`, in a folder of its own."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    launched = launch("--output_dir", folder)
    assert launched.wait(1200) == 0, launched.output()[-4000:]
    return folder, launched


def test_the_reward_rises_and_so_does_accuracy_on_problems_never_trained_on(run):
    summary = json.loads((run[0] / "summary.json").read_text())
    assert summary["reward_first"] <= -0.2
    assert summary["reward_last"] >= 0.3
    assert summary["heldout_accuracy_last"] >= 2 * summary["heldout_accuracy_first"]
    assert summary["world_size"] == RANKS and summary["zero_stage"] == 3
    assert summary["sync_logprob_gap_max"] < 0.3


def test_the_plan_comes_first_and_the_table_last(run):
    output = run[1].output()
    assert output.index("plan\n") < output.index("rollout step  1/") < output.index("held-out accuracy")
    assert f"{RANKS} rank{'s' if RANKS > 1 else ''}, DeepSpeed ZeRO-3" in output


def test_nothing_of_the_run_is_left_running(run):
    assert run[1].alive() == []


def test_every_rollout_step_left_a_complete_line(run):
    rows = read_jsonl(run[0] / "metrics.jsonl")
    assert [row["rollout_step"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["optimizer_step"] for row in rows] == [4 * row["rollout_step"] for row in rows]
    for name in (
        "reward entropy accuracy grad_norm learning_rate completions/mean_length completions/max_length "
        "completions/clipped_ratio clip_ratio/low_mean clip_ratio/high_mean clip_ratio/dual_mean sync/logprob_gap_max "
        "rollout/logprob_gap_mean rollout/logprob_gap_max rollout/logprob_kl "
        "seconds/generation seconds/scoring seconds/training seconds/sync seconds/total tokens_per_second/total"
    ).split():
        assert all(isinstance(row[name], int | float) for row in rows), name
    for row in rows:
        assert row["accuracy"] == pytest.approx((row["reward"] + 1) / 2, abs=1e-6)
        stages = sum(row[f"seconds/{stage}"] for stage in ("generation", "scoring", "training", "sync"))
        assert stages <= row["seconds/total"] * 1.01


def test_the_warm_up_advances_once_per_rollout_step(run):
    rates = [row["learning_rate"] for row in read_jsonl(run[0] / "metrics.jsonl")]
    # tiny.yaml: 4 rollout steps of warm-up, k / 4 for k = 0, 1, ...; the first rollout step changes nothing
    assert [rate / rates[-1] for rate in rates[:5]] == pytest.approx([0, 0.25, 0.5, 0.75, 1]) and len(set(rates[4:])) == 1


def test_samples_say_what_was_asked_answered_and_paid(run):
    samples = read_jsonl(run[0] / "samples.jsonl")
    assert {sample["rollout_step"] for sample in samples} == set(range(1, samples[-1]["rollout_step"] + 1))
    for sample in samples:
        assert sample["prompt"].endswith("\\boxed{}.") and sample["completion"]
        assert (sample["prediction"] == sample["solution"]) == (sample["reward/dapo_reward"] == 1.0)


def test_the_figure_is_there(run):
    assert (run[0] / "dynamics.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_loads_with_transformers_and_answers(run):
    checkpoint = sorted(run[0].glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-1]
    assert list(checkpoint.glob("*.safetensors")) and not list(checkpoint.glob("pytorch_model*"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    sample = read_jsonl(run[0] / "samples.jsonl")[-1]
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": sample["prompt"]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    assert "\\boxed{" in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def test_a_resumed_run_goes_on_where_the_checkpoint_was(run, launch, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(run[0], folder)
    before = read_jsonl(folder / "metrics.jsonl")
    first = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    step = int(first.name.split("-")[1]) // 4
    resumed = launch("--output_dir", folder, "--resume_from_checkpoint", first, "--num_rollout_steps", step + 2)
    assert resumed.wait(600) == 0, resumed.output()[-4000:]
    after = read_jsonl(folder / "metrics.jsonl")
    assert [row["rollout_step"] for row in after] == list(range(1, step + 3))
    assert after[:step] == before[:step]
    # the same prompts, seeds and weights; a server may batch them otherwise, so lengths agree nearly, not to the bit
    for new, old in zip(after[step:], before[step:], strict=False):
        assert new["reward"] == pytest.approx(old["reward"], abs=0.25)
        assert new["entropy"] == pytest.approx(old["entropy"], abs=0.1)
    assert resumed.alive() == []
