"""The launch line: plan, dry run, and one paragraph for each mistake, before anything is trained."""

import json
import runpy
import socket
import time

import pytest

from justrl_trl.jsonl import read_jsonl

from .conftest import ROOT


@pytest.fixture
def recipe(monkeypatch, capsys, tmp_path):
    """Run recipes/grpo_justrl.py in this process; returns exit status and what it printed."""

    def run(*options: str) -> tuple[int, str]:
        argv = ["grpo_justrl.py", "--output_dir", str(tmp_path / "run"), *map(str, options)]
        monkeypatch.setattr("sys.argv", argv)
        status = 0
        try:
            runpy.run_path(str(ROOT / "recipes" / "grpo_justrl.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def problems(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(result, *words: str) -> None:
    status, output = result
    assert status == 2, output
    paragraph = output[output.index("error: ") :]
    assert "Traceback" not in output and "\n\n" not in paragraph.strip()
    for word in words:
        assert word in paragraph, paragraph


def test_a_dry_run_prints_configuration_and_plan_and_starts_nothing(launch, base, tmp_path):
    run = launch("--dry_run", "--output_dir", tmp_path / "run", "--learning_rate", "3e-5")
    assert run.wait(200) == 0, run.output()
    output = run.output()
    for text in ("learning_rate: 3.0e-05", "plan\n", "clip [0.8, 1.28], dual clip 10", "rollout steps x 4 optimizer steps"):
        assert text in output, output
    assert not (tmp_path / "run").exists()


def test_an_unknown_dataset_is_named(recipe):
    refused(recipe("--dataset_name", "no/such/file.jsonl"), "no/such/file.jsonl")


def test_a_dataset_without_answers_is_named_with_its_rows(recipe, tmp_path):
    path = problems(tmp_path / "d.jsonl", [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": None}])
    refused(recipe("--dataset_name", path), "d.jsonl", "1")


def test_a_dataset_without_an_answer_column_is_named(recipe, tmp_path):
    refused(recipe("--dataset_name", problems(tmp_path / "d.jsonl", [{"problem": "1+1?"}])), "problem", "answer")


def test_a_geometry_that_does_not_divide_is_refused(recipe):
    refused(recipe("--generation_batch_size", "250"), "250", "multiple of")


def test_a_server_with_another_model_is_refused(recipe, servers, monkeypatch):
    client = servers["tied"].members[0].client
    monkeypatch.setenv("JUSTRL_SERVER_KEY", client.key)
    refused(recipe("--vllm_server_base_url", client.url), client.model, "--model")


def test_a_server_that_is_not_there_is_refused(recipe):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    refused(recipe("--vllm_server_base_url", address, "--vllm_server_timeout", "2"), str(port), "cannot be reached", "serve.py")


def test_a_port_in_use_is_refused(recipe):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(recipe("--vllm_server_port", port), str(port), "vllm_server_port")


def test_a_prompt_limit_that_drops_every_row_is_refused(recipe):
    refused(recipe("--max_prompt_length", "5"), "max_prompt_length=5", "shortest")


def test_a_dry_run_needs_neither_the_model_nor_a_network(launch, tmp_path):
    recipe = ROOT / "recipes" / "justrl_deepseek_1.5b.yaml"
    started = time.monotonic()
    run = launch(
        "--config", recipe, "--dry_run", "--model_name_or_path", "nobody/nothing", "--output_dir", tmp_path / "run", ranks=1
    )
    assert run.wait(300) == 0, run.output()[-3000:]
    output = run.output()
    assert "4,380 rollout steps x 4 optimizer steps" in output and "model_name_or_path: nobody/nothing" in output
    assert "missing      tokenizer not looked up: model_name_or_path='nobody/nothing'" in output
    assert time.monotonic() - started < 60, "an absent network is not waited for"
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_in_a_recipe_is_named(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text((ROOT / "recipes" / "tiny.yaml").read_text() + "\nlerning_rate: 1.0\n")
    refused(recipe("--config", path), "lerning_rate")


def test_an_unknown_model_is_named(recipe):
    refused(recipe("--model_name_or_path", "/no/such/model"), "/no/such/model")


@pytest.mark.cpu_only("a GPU may have FlashAttention")
def test_flash_attention_that_cannot_run_is_refused(recipe):
    refused(recipe("--attn_implementation", "flash_attention_2"), "flash_attention_2", "no GPU", "--attn_implementation auto")


def test_remote_servers_that_could_not_reach_the_trainer_are_refused(recipe):
    servers = recipe("--rollout_servers", "http://192.0.2.7:8000")
    refused(servers, "weight_sync_address='127.0.0.1'", "http://192.0.2.7:8000", "--weight_sync_address ")


def test_a_budget_below_one_full_sequence_is_refused(recipe):
    refused(recipe("--max_tokens_per_micro_batch", "100"), "max_tokens_per_micro_batch=100", "at least 112")


def test_an_unknown_loss_backend_is_refused(recipe):
    refused(recipe("--loss_backend", "lyger"), "loss_backend", "lyger")


def test_pushing_to_the_hub_without_a_login_is_refused_before_anything_starts(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    refused(recipe("--push_to_hub"), "push_to_hub=True", "hf auth login")
    assert not (tmp_path / "run").exists()


def test_adapters_are_trained_pushed_merged_and_saved_under_zero3(launch, tmp_path):
    options = ["--use_peft", "--lora_r", "8", "--learning_rate", "2e-3", "--warmup_rollout_steps", "0"]
    run = launch("--output_dir", tmp_path / "run", "--num_rollout_steps", "2", "--report_to", "tensorboard", *options)
    assert run.wait(400) == 0, run.output()[-4000:]
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    # the second push carries changed adapters: the server agrees only if they were merged into what it got
    assert len(rows) == 2 and rows[1]["approx_kl"] > 0 and max(row["sync/logprob_gap_mean"] for row in rows) < 0.05
    assert (tmp_path / "run" / "checkpoint-8" / "adapter_model.safetensors").exists()
    assert list((tmp_path / "run").glob("**/events.out.tfevents*"))
