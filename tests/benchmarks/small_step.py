"""The training part of a rollout step on a machine without a GPU: this package against stock TRL.

`training_step.py --preset cpu` runs it. Both sides run in alternation in one process on the same responses, whose lengths are
spread as in the paper's run. Memory of the loss is measured at the vocabulary of Qwen2, each kernel in a process of its own;
collectives in two ranks. The last line is one JSON object.
"""

import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers
from transformers import PrinterCallback

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from justrl_trl.config import JustRLConfig  # noqa: E402
from justrl_trl.policy.balance import load_imbalance, plan_micro_batches  # noqa: E402
from tests.side_by_side import Case, build  # noqa: E402

# lengths 1/16 of the paper's, a model of 4 million parameters; TRL's rows as a user would set them: two at a time
SETTINGS = {
    "model": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 64},
    "longest": 960,
    "responses": 64,
    "rows": 2,
    "budget": 2048,
}
LOSS_SHAPE = {"tokens": 2048, "hidden": 256, "vocabulary": 151936}


class Measured:
    """Seconds, tokens and padding of one trainer's training part."""

    def __init__(self, case: Case):
        self.wall = self.cpu = 0.0
        self.computed = self.real = 0
        self._folder = tempfile.TemporaryDirectory()
        self.trainer = trainer = build(case, self._folder.name)
        trainer.remove_callback(PrinterCallback)
        original = trainer.training_step
        embedding = trainer.model.get_input_embeddings()

        def timed(*args, **kwargs):
            wall, cpu = time.perf_counter(), time.process_time()
            result = original(*args, **kwargs)
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu
            return result

        def count(module, args):
            self.computed += args[0].numel()

        trainer.training_step = timed
        embedding.register_forward_pre_hook(count)

    def run(self) -> "Measured":
        self.trainer.train()
        # every response is scored once and trained once
        self.real = 2 * next(int(row["num_tokens"]) for row in self.trainer.seen["metrics"] if "num_tokens" in row)
        return self


def throughput(settings: dict, repetitions: int) -> dict:
    """Tokens per second of both sides in alternation; medians."""
    common = {name: settings[name] for name in ("model", "longest", "responses")}
    per_step = settings["responses"] // 4
    cases = {
        "trl": Case("trl", **common, accumulation=per_step // settings["rows"]),
        "ours": Case("ours", **common, budget=settings["budget"], changes={"loss_backend": "liger"}),
        "ours_trl_kernel": Case("ours", **common, budget=settings["budget"], changes={"loss_backend": "trl"}),
    }
    speeds = {name: [] for name in cases}
    padding = {}
    for repetition in range(repetitions + 1):
        for name, case in cases.items():
            measured = None  # the trainer before goes first, and its memory with it
            gc.collect()
            measured = Measured(case).run()
            padding[name] = 1 - measured.real / measured.computed
            if repetition:  # the first one warms up
                speeds[name].append((measured.real / 2 / measured.wall, measured.real / 2 / measured.cpu))
                print(f"  {repetition}/{repetitions} {name:<20}{speeds[name][-1][0]:10,.0f} tokens/s", flush=True)
    wall = {name: statistics.median(one[0] for one in values) for name, values in speeds.items()}
    cpu = {name: statistics.median(one[1] for one in values) for name, values in speeds.items()}
    print(f"\n  {'':<20}{'tokens/s':>10}{'per CPU s':>11}{'padding':>9}{'x TRL':>7}")
    for name in cases:
        print(f"  {name:<20}{wall[name]:>10,.0f}{cpu[name]:>11,.0f}{padding[name]:>9.1%}{wall[name] / wall['trl']:>7.2f}")
    return {
        "tokens_per_second_trl": round(wall["trl"], 1),
        "tokens_per_second_ours": round(wall["ours"], 1),
        "tokens_per_second_ratio": round(wall["ours"] / wall["trl"], 3),
        "tokens_per_cpu_second_ratio": round(cpu["ours"] / cpu["trl"], 3),
        "tokens_per_second_ratio_trl_kernel": round(wall["ours_trl_kernel"] / wall["trl"], 3),
        "padding_share": round(padding["ours"], 4),
        "padding_share_trl": round(padding["trl"], 4),
    }


def imbalance(ranks: int, optimizer_steps: int = 8) -> float:
    """Worst of a few optimizer steps of 512 responses at the paper's lengths, 32,768 tokens per micro-batch."""
    rng, worst = random.Random(0), 1.0
    for _ in range(optimizer_steps):
        lengths = [min(15360, int(15360 * rng.lognormvariate(-1.54, 0.95)) + 1) + rng.randint(60, 300) for _ in range(512)]
        worst = max(worst, load_imbalance(lengths, plan_micro_batches(lengths, ranks, JustRLConfig.max_tokens_per_micro_batch)))
    return round(worst, 4)


def collectives() -> dict:
    """Calls of torch's collectives made by the trainer, two ranks under DDP: in an optimizer step and in a rollout step."""
    cases = {"trl": {"trainer": "trl", "accumulation": 4}, "ours": {"trainer": "ours"}}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seen.pt"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        program = [str(ROOT / "tests" / "side_by_side.py"), str(out), json.dumps(cases)]
        # two processes on the CPU under DDP, whatever this one was launched with
        env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "TORCHELASTIC_", "MASTER_"))}
        env = {
            **env,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run([*launcher, *program], env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-4000:])
        seen = torch.load(out, weights_only=True)
    calls = {name: one["collectives"] for name, one in seen.items()}
    return {
        "collectives_per_optimizer_step": max(calls["ours"][1:]),
        "collectives_per_rollout_step": sum(calls["ours"]),
        "collectives_per_rollout_step_trl": sum(calls["trl"]),
    }


def loss_memory() -> dict:
    """Peak memory of one forward and backward pass of head and loss over what its inputs hold, MiB; and seconds."""
    result = {}
    for kernel in ("naive", "trl", "liger"):
        done = subprocess.run([sys.executable, __file__, kernel], capture_output=True, text=True, check=True)
        peak, seconds = json.loads(done.stdout.splitlines()[-1])
        print(f"  {kernel:<8}{peak:8,.0f} MiB{seconds:8.1f} s", flush=True)
        result[f"peak_memory_{kernel}_mib"] = round(peak)
        result[f"loss_seconds_{kernel}"] = round(seconds, 2)
    return result


def one_kernel(kernel: str) -> None:
    """In a process of its own: inputs of `LOSS_SHAPE`, one pass, peak over base."""
    import threading

    import psutil
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    from justrl_trl.policy.fused_loss import liger_policy_loss
    from justrl_trl.policy.loss import policy_loss

    tokens, hidden, vocabulary = LOSS_SHAPE.values()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).to(device).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5).to(device).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator).to(device)
    old, advantages = torch.full((tokens,), -12.0, device=device), torch.randn(tokens, generator=generator).to(device)
    mask, clip = torch.ones(tokens, device=device), {"epsilon_low": 0.2, "epsilon_high": 0.28, "delta": 10.0}
    process, peak, running = psutil.Process(), 0, True
    base = process.memory_info().rss
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        on_gpu = torch.cuda.memory_allocated()

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, process.memory_info().rss - base)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    if kernel == "naive":
        logps = torch.log_softmax(x @ weight.T, dim=-1).gather(1, targets[:, None])[:, 0]
        loss = policy_loss(logps, old, advantages, mask, **clip).sum() / tokens
    elif kernel == "trl":  # as the trainer calls it: entropy comes along
        fields = ("log_probs", "entropy")
        head = (x, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, fields)
        logps = _ChunkedLogProbFunction.apply(*head)[0]
        loss = policy_loss(logps, old, advantages, mask, **clip).sum() / tokens
    else:
        values = {"old_per_token_logps": old, "advantages": advantages, "denominator": float(tokens), **clip}
        loss, _ = liger_policy_loss(x, weight, None, targets, **values)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    running = False
    watcher.join()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() - on_gpu
    print(json.dumps([peak / 2**20, seconds]))


def main(repetitions: int, budget: int | None) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*pin_memory")
    settings = SETTINGS | ({"budget": budget} if budget else {})
    machine = f"{os.cpu_count()} CPU cores"
    print(f"{machine}, preset cpu, {settings['responses']} responses, budget {settings['budget']:,} tokens\n")
    result = {"machine": machine, "preset": "cpu", **throughput(settings, repetitions)}
    print(f"\nhead and loss, {LOSS_SHAPE['tokens']:,} tokens x {LOSS_SHAPE['vocabulary']:,} words, forward and backward")
    result |= loss_memory()
    result |= {"load_imbalance_2": imbalance(2), "load_imbalance_32": imbalance(32), **collectives()}
    print(f"\nload imbalance at full size: {result['load_imbalance_2']} on 2 ranks, {result['load_imbalance_32']} on 32")
    print(json.dumps(result))


if __name__ == "__main__":  # a process of `loss_memory`
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    one_kernel(sys.argv[1])
