"""One measurement of `large_step`, in a process of its own: a trainer on recorded responses, or the memory of packed rows.

    python one_variant.py '{"kind": "training", ...}'      # started by large_step.py, in the environment of `accelerate launch`

It imports everything, waits for a line on stdin, measures, and prints one JSON object as its last line. (So the next process
imports while this one measures; imports take as long as a measurement.)
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import psutil
import torch
import transformers
from transformers import PrinterCallback, TrainerCallback

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from justrl_trl.distributed import leave  # noqa: E402
from justrl_trl.policy.micro_batches import MicroBatch, OptimizerStep  # noqa: E402
from justrl_trl.policy.packing import Sequence, pack  # noqa: E402
from justrl_trl.training.stages import StageClock  # noqa: E402
from tests.benchmarks.model_flops import forward_flops, utilization  # noqa: E402
from tests.side_by_side import Case, build  # noqa: E402

STAGES = ("scoring", "forward_backward", "optimizer")


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PeakMemory:
    """Peak of what the trainer's tensors take on the GPU; without one, of the process's resident memory.

    Attributes:
        gib: the peak inside `watch()`; `gib_before`: at its start.
    """

    gib = gib_before = 0.0

    @contextmanager
    def watch(self):
        """Measure what happens inside."""
        gpu, process, running = torch.cuda.is_available(), psutil.Process(), True
        self.gib_before = (torch.cuda.memory_allocated() if gpu else process.memory_info().rss) / 2**30

        def sample() -> None:
            while running:
                self.gib = max(self.gib, process.memory_info().rss / 2**30)
                time.sleep(0.01)

        if gpu:
            torch.cuda.reset_peak_memory_stats()
        watcher = threading.Thread(target=sample if not gpu else lambda: None, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            running = False
            watcher.join()
            self.gib = torch.cuda.max_memory_allocated() / 2**30 if gpu else self.gib


class AfterOptimizerStep(TrainerCallback):
    """Calls `action` once, after the optimizer step with this number."""

    def __init__(self, number: int, action: Callable[[], None]):
        self._number, self._action = number, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._number:
            self._action()


def lean_trainer(case: Case, folder: str):
    """The trainer of a case, without its last checkpoint and without a line per log."""
    trainer = build(case, folder)
    trainer.args.save_strategy = "no"
    trainer.remove_callback(PrinterCallback)
    return trainer


def timed(owner, name: str, clock: StageClock, stage: str) -> None:
    """Add the time of every call of a method to a stage, less what stages inside it take for themselves."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        synchronize()
        with clock.stage(stage):
            result = original(*args, **kwargs)
            synchronize()
        return result

    setattr(owner, name, call)


def instrument(trainer, clock: StageClock, lengths: list) -> None:
    """Time the stages of a trainer, ours or TRL's, and note the lengths of what it trains on.

    Sampling and rewards are not part of the comparison; they only hand out recorded responses here.
    """
    generate, train = trainer._generate_single_turn, trainer.training_step

    def noting(prompt_ids, *args, **kwargs):
        rows = generate(prompt_ids, *args, **kwargs)
        lengths[:] = [(len(prompt), len(row)) for prompt, row in zip(prompt_ids, rows[0], strict=True)]
        return rows

    def training_step(*args, **kwargs):
        engine = trainer.accelerator.deepspeed_engine_wrapped.engine  # made by `train`
        if "step" not in vars(engine):
            timed(engine, "step", clock, "optimizer")
        return train(*args, **kwargs)

    trainer._generate_single_turn, trainer.training_step = noting, training_step
    for name in ("_generate_single_turn", "_calculate_rewards"):
        timed(trainer, name, clock, "sampling")
    timed(trainer, "_prepare_inputs", clock, "scoring")
    timed(trainer, "training_step", clock, "forward_backward")


def measure_training(case: Case, peak_tflops: float) -> dict:
    """A rollout step to warm up and one that counts: tokens/s, utilization, seconds of each stage, peak memory."""
    clock, lengths, memory = StageClock(), [], PeakMemory()

    def forget_warmup() -> None:
        clock.restart()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    with tempfile.TemporaryDirectory() as folder:
        trainer = lean_trainer(case, folder)
        instrument(trainer, clock, lengths)
        trainer.add_callback(AfterOptimizerStep(case.optimizer_steps, forget_warmup))
        with memory.watch():
            trainer.train()
    seconds = {stage: clock.seconds[stage] for stage in STAGES}
    forward = forward_flops(trainer.model.config, lengths)
    tokens = sum(map(sum, lengths))
    return {
        "tokens": tokens,
        "longest": max(map(sum, lengths)),
        "tokens_per_second": tokens / sum(seconds.values()),
        "seconds": seconds,
        "forward_tflop": forward / 1e12,
        **utilization(forward, seconds, peak_tflops),
        "peak_gib": memory.gib,
    }


def measure_memory(case: Case, budgets: list[int]) -> dict:
    """Peak memory of forward and backward pass over one packed row, at each token budget; the smallest budget first.

    The rows run after an optimizer step, when weights, gradients and optimizer states are all there.
    """
    found: dict[str, dict] = {}

    def on_every_budget() -> None:
        for budget in sorted(budgets):
            try:
                found[str(budget)] = one_row(trainer, case, budget)
            except torch.OutOfMemoryError as error:  # larger ones will not fit either
                found[str(budget)] = {"error": str(error).splitlines()[0]}
                return

    with tempfile.TemporaryDirectory() as folder:
        trainer = lean_trainer(case, folder)
        trainer.add_callback(AfterOptimizerStep(1, on_every_budget))
        trainer.train()
    return {"budgets": found}


def one_row(trainer, case: Case, budget: int) -> dict:
    """Forward and backward pass over one packed row of `budget` tokens: sequences of the longest length and a rest.

    Returns:
        `states_gib` before, `peak_gib` inside, `seconds`, `tokens`.
    """
    device, vocabulary = trainer.accelerator.device, trainer.model.config.vocab_size
    full = min(case.longest, budget)
    lengths = [full] * (budget // full) + ([budget % full] if budget % full > 16 else [])
    sequences = [Sequence(torch.randint(vocabulary, (length,)), 8, 1.0, row) for row, length in enumerate(lengths)]
    responses = [len(s) - 8 for s in sequences]
    tokens = sum(responses)
    old = torch.full((tokens,), -12.0, device=device)
    advantages = torch.ones(tokens, device=device)
    batch = MicroBatch(pack(sequences, device), advantages, list(range(len(sequences))), responses, old)
    step = OptimizerStep([batch], len(sequences), tokens, 1.0)
    model, memory = trainer.model_wrapped, PeakMemory()
    trainer.accelerator.gradient_state._set_sync_gradients(False)  # no update: the next row wants the same states
    synchronize()
    with memory.watch():
        started = time.perf_counter()
        loss, _ = trainer.policy.loss(model, batch, step)
        trainer.accelerator.backward(loss, scale_wrt_gas=False)
        synchronize()
        seconds = time.perf_counter() - started
    return {"tokens": sum(lengths), "peak_gib": memory.gib, "states_gib": memory.gib_before, "seconds": seconds}


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not sys.stdin.readline():
        return  # whoever started this process has gone
    if not torch.cuda.is_available():  # DeepSpeed would compile for minutes what only its inference engine calls
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    case = Case(**task["case"])
    if task["kind"] == "memory":
        result = measure_memory(case, task["budgets"])
    else:
        result = measure_training(case, task["peak_tflops"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print("\n" + json.dumps({"device": device, "torch": torch.__version__, **result}), flush=True)
    leave(0)  # without tearing DeepSpeed down


if __name__ == "__main__":
    main()
