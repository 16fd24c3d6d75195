"""The training part of a rollout step at full size: Qwen2-1.5B's shape, 16k limit, bf16, ZeRO-3 with one rank.

    accelerate launch --config_file accelerate_configs/zero3_1gpu.yaml tests/benchmarks/training_step.py --preset 1.5b
    ... --preset 1.5b --quick                          # one repetition of the main variants, a third of the time
    DS_ACCELERATOR=cpu accelerate launch --config_file accelerate_configs/zero3_cpu_2proc.yaml --num_processes 1 \\
        tests/benchmarks/training_step.py --preset 1.5b-rehearsal      # the same code, a shape for a CPU

Compared are this package with both of its attentions (FlashAttention's varlen kernel, SDPA sequence by sequence) and both of
its loss kernels (Liger's, TRL's), and TRL as it is, on the same random weights and the same recorded responses; lengths are
spread as in the paper's run. TRL runs two rows at a time and with its default attention, SDPA on padded rows.

A trainer with its DeepSpeed engine never gives all of its memory back, so each measurement has a process of its own; variants
alternate. A process takes one rollout step to warm up and measures the next one. Ours warms up at full size. TRL's warm-up
has responses of an eighth of the length, because the whole would take half a minute; what it has left to do later (taking
memory from the driver) costs it less than one percent.

Tokens per second are prompt and response tokens of the rollout step over the seconds of scoring, forward and backward passes
and optimizer step. How utilization counts operations stands in `model_flops`. A variant that fails is reported and the others
go on; the status is 1 if one of ours failed.
"""

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from justrl_trl.policy.attention import PACKED_SDPA, PACKED_VARLEN

STAGES = ("scoring", "forward_backward", "optimizer")
NO_GPU = "no GPU"
# name: trainer, attention, loss kernel
VARIANTS = {
    "ours, varlen, Liger": ("ours", PACKED_VARLEN, "liger"),
    "ours, varlen, TRL's kernel": ("ours", PACKED_VARLEN, "trl"),
    "ours, SDPA, Liger": ("ours", PACKED_SDPA, "liger"),
    "ours, SDPA, TRL's kernel": ("ours", PACKED_SDPA, "trl"),
    "stock TRL": ("trl", None, None),
}
QUICK = [name for name in VARIANTS if name != "ours, SDPA, TRL's kernel"]
MEMORY = "memory"
PRESETS = {
    "1.5b": {
        "model": {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "initializer_range": 0.02,
        },
        "longest": 15360,
        "budget": 32768,
        "memory_budgets": [8192, 16384, 32768, 65536],
        "bf16": True,
        "seconds_per_variant": 150,
    },
    "1.5b-rehearsal": {
        "model": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": 4096,
            "initializer_range": 0.02,
        },
        "longest": 480,
        "budget": 1024,
        "memory_budgets": [256, 512, 1024, 2048],
        "bf16": False,
        "seconds_per_variant": 150,
    },
}
OPTIMIZER_STEPS = 2  # of a rollout step. With one, TRL would have nothing to score: its ratios are 1 then
RESPONSES = 32  # of a rollout step: 16 per optimizer step, as each of the paper's 32 GPUs has; half of it with --quick
ROWS = 2  # TRL's micro-batch, as a user would set it


@dataclass
class Job:
    """One process: a repetition of a variant, or the memory of packed rows."""

    name: str
    task: dict  # for `one_variant.py`


class Child:
    """A process of `one_variant.py`, which imports at once and measures when `result` is called."""

    def __init__(self, job: Job):
        self._errors = tempfile.TemporaryFile("w+")
        program = [sys.executable, str(Path(__file__).with_name("one_variant.py")), json.dumps(job.task)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(program, env=environment(), text=True, start_new_session=True, **pipes)

    def result(self, seconds: float) -> dict:
        """What it measured; or `error`, the last line that says what went wrong."""
        try:
            output, _ = self._process.communicate("go\n", timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return {"error": f"still running after {seconds:.0f} s; the process was ended"}
        found = [line for line in output.splitlines() if line.startswith("{")]
        if self._process.returncode == 0 and found:
            return json.loads(found[-1])
        self._errors.seek(0)
        return {"error": last_error(self._errors.read()) or f"ended with status {self._process.returncode}"}

    def kill(self) -> None:
        """End it with all that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def environment() -> dict[str, str]:
    """The launcher's environment for a single rank: its settings for DeepSpeed, and a rendezvous of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}  # the launcher's own rendezvous
    return inherited | rank


def last_error(text: str) -> str:
    """The last line of a log that names an exception, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(\[rank0\]: ?)?[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines or [""])[-1][:300]


def jobs(preset: dict, variants: list[str], repetitions: int, responses: int, peak_tflops: float) -> list[Job]:
    """All measurements in the order in which they run: variants in alternation, memory after the first round."""
    common = {name: preset[name] for name in ("model", "longest", "bf16")}
    common |= {"responses": responses, "optimizer_steps": OPTIMIZER_STEPS, "rollout_steps": 2, "gradient_checkpointing": True}
    common |= {"learning_rate": 1e-6, "recorded": False, "whole_parameters": True}
    common["device"] = "cuda" if torch.cuda.is_available() else "cpu"

    def case(trainer: str, attention: str | None, kernel: str | None) -> dict:
        own = {"attention": attention, "budget": preset["budget"], "changes": {"loss_backend": kernel}}
        stock = {"accumulation": responses // OPTIMIZER_STEPS // ROWS, "warmup_share": 8}
        return {"trainer": trainer, **common, **(own if trainer == "ours" else stock)}

    one_round = [Job(n, {"kind": "training", "peak_tflops": peak_tflops, "case": case(*VARIANTS[n])}) for n in variants]
    attention = PACKED_VARLEN if torch.cuda.is_available() else PACKED_SDPA
    memory = case("ours", attention, "liger") | {"rollout_steps": 1, "optimizer_steps": 1, "warmup_share": 8}
    memory["responses"] = 8
    whole = Job(MEMORY, {"kind": "memory", "budgets": preset["memory_budgets"], "case": memory})
    return [*one_round, whole, *one_round * (repetitions - 1)]


def run(todo: list[Job], seconds_each: float, on_result) -> None:
    """One process after another has the machine; the next one imports meanwhile.

    Args:
        on_result: called with each job and what came of it.
    """
    following = Child(todo[0]) if todo else None
    children = [following]
    try:
        for number, job in enumerate(todo, start=1):
            child = following
            following = Child(todo[number]) if number < len(todo) else None
            children.append(following)
            on_result(job, child.result(seconds_each))
    finally:
        for child in filter(None, children):
            child.kill()


def summary(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """Medians over the repetitions of each variant, or why there are none."""
    table: dict[str, dict] = {}
    for name, results in runs.items():
        good = [r for r in results if "error" not in r]
        if not good:
            reason = results[-1]["error"] if results else "not run"
            table[name] = {"status": NO_GPU if reason == NO_GPU else "failed", "error": reason}
            continue
        middle = {k: statistics.median(r[k] for r in good) for k in good[0] if isinstance(good[0][k], (int, float))}
        middle["seconds"] = {stage: statistics.median(r["seconds"][stage] for r in good) for stage in STAGES}
        table[name] = {"status": "ok", "runs": len(good), **middle}
        errors = [r["error"] for r in results if "error" in r]
        if errors:
            table[name] |= {"status": "failed", "error": errors[-1]}
    return table


def percent(utilization: float) -> str:
    """For people; a CPU has another peak than the one that it was computed with."""
    return f"{utilization:.1%}" if torch.cuda.is_available() else "-"


def print_tables(result: dict) -> None:
    """Speed of each variant, and memory at each budget."""
    stock = result["variants"].get("stock TRL", {}).get("tokens_per_second")
    print(f"\n  {'':<28}{'tokens/s':>9}{'x TRL':>7}{'MFU':>7}{'MFU*':>7}{'scoring':>9}{'fwd+bwd':>9}{'optim.':>8}{'peak':>10}")
    for name, row in result["variants"].items():
        if "tokens_per_second" in row:
            ratio = f"{row['tokens_per_second'] / stock:.2f}" if stock else "-"
            speed = f"{row['tokens_per_second']:>9,.0f}{ratio:>7}"
            mfu = "".join(f"{percent(row[key]):>7}" for key in ("mfu_training", "mfu_training_and_scoring"))
            stages = "".join(f"{row['seconds'][stage]:>{width}.2f}" for stage, width in zip(STAGES, (9, 9, 8), strict=True))
            print(f"  {name:<28}{speed}{mfu}{stages}{row['peak_gib']:>6.1f} GiB")
        if row["status"] != "ok":
            print(f"  {name:<28} {row['status'] if row['status'] == NO_GPU else 'failed: ' + row['error']}")
    print(f"  MFU: of forward, backward and optimizer step, at {result['peak_tflops']:,.0f} TFLOP/s; MFU*: and of scoring.")
    print("  Seconds are those of a rollout step.")
    if "error" in result["memory"]:
        print(f"\n  memory of a packed row: failed: {result['memory']['error']}")
    for budget, row in result["memory"].get("budgets", {}).items():
        text = f"failed: {row['error']}" if "error" in row else (
            f"peak {row['peak_gib']:.2f} GiB, of which {row['states_gib']:.2f} GiB before it; {row['seconds']:.2f} s"
        )  # fmt: skip
        print(f"  packed row of {int(budget):>6,} tokens, forward and backward: {text}")


def main(preset_name: str, *, quick: bool, repetitions: int, budget: int | None, peak_tflops: float, out: Path | None) -> int:
    """Run the preset; returns the exit status."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        lines = __doc__.split("\n\n")[1]
        sys.exit(f"error: --preset {preset_name} runs under DeepSpeed ZeRO-3. Start it with\n{lines}")
    started = time.perf_counter()
    preset = PRESETS[preset_name] | ({"budget": budget} if budget else {})
    responses = RESPONSES // 2 if quick else RESPONSES
    if quick:
        repetitions, preset["memory_budgets"] = 1, preset["memory_budgets"][::2]
    variants = QUICK if quick else list(VARIANTS)
    runs: dict[str, list[dict]] = {name: [] for name in variants}
    result = {"preset": preset_name, "quick": quick, "responses": responses, "budget": preset["budget"], "memory": {}}
    result["peak_tflops"] = peak_tflops
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"preset {preset_name}: {responses} responses of up to {preset['longest']:,} tokens in {OPTIMIZER_STEPS} "
        f"optimizer steps, micro-batches of {preset['budget']:,} tokens, repetitions: {repetitions}",
        flush=True,
    )

    def on_result(job: Job, measured: dict) -> None:
        for key in ("device", "torch"):
            if key in measured:
                result[key] = measured.pop(key)
        if job.name == MEMORY:
            result["memory"] = measured
            text = measured.get("error") or f"{len(measured['budgets'])} budgets"
        else:
            runs[job.name].append(measured)
            text = (
                measured.get("error")
                or f"{measured['tokens_per_second']:,.0f} tokens/s, MFU {percent(measured['mfu_training'])}"
            )
        print(f"  {time.perf_counter() - started:6.1f} s  {job.name:<28}{text}", flush=True)
        result["variants"], result["runs"] = summary(runs), runs
        result["wall_seconds"] = round(time.perf_counter() - started, 1)
        if out:
            temporary = out.with_suffix(".tmp")
            temporary.write_text(json.dumps(result, indent=1) + "\n")
            temporary.replace(out)

    todo = jobs(preset, variants, repetitions, responses, peak_tflops)
    if not torch.cuda.is_available():  # FlashAttention runs on nothing else
        absent = [job for job in todo if job.task["case"].get("attention") == PACKED_VARLEN]
        todo = [job for job in todo if job not in absent]
        for job in absent:
            on_result(job, {"error": NO_GPU})
    run(todo, preset["seconds_per_variant"], on_result)
    print(f"\n{result.get('device')}, torch {result.get('torch')}")
    print_tables(result)
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}))
    ours = [row["status"] for name, row in result["variants"].items() if name.startswith("ours")]
    budgets = result["memory"].get("budgets", {})
    fits = [row for row in budgets.values() if "error" not in row]
    return int("failed" in ours or not fits)
