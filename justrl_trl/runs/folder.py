"""The run folder: what a researcher wants to find the morning after.

```
config.yaml        the resolved configuration, loadable with --config
metrics.jsonl      one line per rollout step
samples.jsonl      a few completions per rollout step, with prompt, solution, prediction, reward, advantage
heldout.jsonl      accuracy on held-out problems, before and after
validation.jsonl   scores of each benchmark, where there is validation
dynamics.png       reward, entropy, response length against rollout step (the paper's Figure 2)
summary.json       the run in a dozen numbers
vllm_server.log    output of the managed server
checkpoint-N/      N optimizer steps; resumable; loads with AutoModelForCausalLM
```

Only rank 0 writes. A resumed run drops the lines beyond its checkpoint and goes on; a new run moves an old folder aside.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import yaml
from transformers import TrainerCallback

from justrl_trl.config import JustRLConfig
from justrl_trl.reports.figures import plot_dynamics
from justrl_trl.reports.paper import family_of, figure1
from justrl_trl.runs.heldout import heldout_accuracy

_FIGURE_EVERY_SECONDS = 60.0


class RunFolder:
    """Paths and records of one run.

    Args:
        path: `output_dir` of the run.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.heldout = self.path / "heldout.jsonl"
        self.validation = self.path / "validation.jsonl"
        self.figure = self.path / "dynamics.png"
        self.summary = self.path / "summary.json"
        self.server_log = self.path / "vllm_server.log"
        self.config = self.path / "config.yaml"

    def prepare(self, resume: bool) -> Path | None:
        """Make the folder; without `resume` a used one is moved aside first, so that no run overwrites another.

        Returns:
            Where the old folder went, if there was one.
        """
        moved = None
        if not resume and any(file.exists() for file in (self.config, self.metrics, self.validation)):
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
            moved = self.path.with_name(f"{self.path.name}-before-{stamp}")
            self.path.rename(moved)
        self.path.mkdir(parents=True, exist_ok=True)
        return moved

    def cut(self, rollout_step: int) -> None:
        """Drop records beyond `rollout_step`: a resumed run makes them again."""
        for file in (self.metrics, self.samples, self.heldout, self.validation):
            if file.exists():
                kept = [row for row in read_jsonl(file) if row["rollout_step"] <= rollout_step]
                file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def resolved(self, *parts: object) -> dict:
        """The configuration after all defaults and overrides, as plain values that `--config` reads back; no tokens."""
        config = {}
        for part in parts:
            config |= {k: v for k, v in _plain(part).items() if v is not None and "token" not in k.split("_")}
        return config

    def write_config(self, *parts: object) -> None:
        """Write `resolved()`."""
        self.config.write_text(yaml.safe_dump(self.resolved(*parts), sort_keys=True, allow_unicode=True))


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSONL file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_jsonl(path: Path, row: dict) -> None:
    """One row, on disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _json_ready(logs: dict) -> dict:
    """JSON has no infinity and no NaN: a gradient norm that is not finite becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}


def _plain(part: object) -> dict:
    """Dataclass fields as YAML-ready values, as given on input rather than as derived."""
    values = part.to_dict() if hasattr(part, "to_dict") else asdict(part)
    if isinstance(part, JustRLConfig):
        # derived from the number of ranks; the whole batch is what the recipe states
        for name in ("per_device_train_batch_size", "max_steps", "save_steps", "logging_steps", "warmup_steps"):
            values.pop(name)
    return json.loads(json.dumps(values, default=str))


class RecordRun(TrainerCallback):
    """Writes the run folder while training goes on.

    Args:
        folder: where to.
        model: name of the base model; the paper's curve is drawn beside validation where it is the paper's model.
        trainer: the `JustRLTrainer` (its completion logs and held-out sampling are read); set after construction.
        on_row: called with each new row of metrics, e.g. to print it.
    """

    def __init__(self, folder: RunFolder, model: str, on_row: Callable[[dict], None] = lambda row: None):
        self.folder, self._on_row = folder, on_row
        family = family_of(model)
        self._paper = figure1(family) if family else {}
        self.trainer = None
        self._last_figure = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.folder.cut(args.rollout_step(state.global_step))
        if state.global_step == 0:
            self._record_heldout(args, state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "reward" not in (logs or {}):
            return
        step = args.rollout_step(state.global_step)
        row = {"rollout_step": step, "optimizer_step": state.global_step, **_json_ready(logs)}
        append_jsonl(self.folder.metrics, row)
        for sample in self._samples(args.num_completions_to_save):
            append_jsonl(self.folder.samples, {"rollout_step": step, **sample})
        self._on_row(row)
        if time.monotonic() - self._last_figure > _FIGURE_EVERY_SECONDS:
            self._draw()

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._draw()

    def on_train_end(self, args, state, control, **kwargs):
        self._record_heldout(args, state)
        if state.is_world_process_zero:
            self._draw()

    def _record_heldout(self, args, state) -> None:
        accuracy = heldout_accuracy(self.trainer)
        if accuracy is not None and state.is_world_process_zero:
            row = {"rollout_step": args.rollout_step(state.global_step), "accuracy": accuracy}
            append_jsonl(self.folder.heldout, row)

    def _samples(self, count: int) -> list[dict]:
        """The first `count` different prompts of the rollout step, one completion each."""
        logs = self.trainer._logs
        group = self.trainer.num_generations
        picked = range(0, min(count * group, len(logs["prompt"])), group)
        extra = {name: list(values) for name, values in logs["extra"].items()}
        rewards = {name: list(values) for name, values in logs["rewards"].items()}
        return [
            {
                "prompt": _text(logs["prompt"][i]),
                "completion": _text(logs["completion"][i]),
                **{name: values[i] for name, values in extra.items()},
                **{f"reward/{name}": values[i] for name, values in rewards.items()},
                "advantage": logs["advantages"][i],
            }
            for i in picked
        ]

    def _draw(self) -> None:
        self._last_figure = time.monotonic()
        metrics, heldout, validation = map(read_jsonl, (self.folder.metrics, self.folder.heldout, self.folder.validation))
        plot_dynamics(metrics, heldout, self.folder.figure, validation, self._paper)


def _text(conversation) -> str:
    return conversation if isinstance(conversation, str) else conversation[-1]["content"]


def write_summary(folder: RunFolder, *, seconds: float, world_size: int, zero_stage: int) -> dict:
    """`summary.json` from the records of the run: first and last are means over three rollout steps.

    Args:
        seconds: wall time of this launch, start of the server included.
        world_size: ranks.
        zero_stage: DeepSpeed ZeRO stage, 0 without DeepSpeed.
    """
    rows, heldout = read_jsonl(folder.metrics), read_jsonl(folder.heldout)

    def mean(name: str, part: list[dict]) -> float | None:
        values = [row[name] for row in part if row.get(name) is not None]
        return sum(values) / len(values) if values else None

    summary = {
        "reward_first": mean("reward", rows[:3]),
        "reward_last": mean("reward", rows[-3:]),
        "heldout_accuracy_first": heldout[0]["accuracy"] if heldout else None,
        "heldout_accuracy_last": heldout[-1]["accuracy"] if len(heldout) > 1 else None,
        "rollout_steps": rows[-1]["rollout_step"] if rows else 0,
        "optimizer_steps": rows[-1]["optimizer_step"] if rows else 0,
        "entropy_first": mean("entropy", rows[:3]),
        "entropy_last": mean("entropy", rows[-3:]),
        "response_length_first": mean("completions/mean_length", rows[:3]),
        "response_length_last": mean("completions/mean_length", rows[-3:]),
        "seconds": round(seconds, 1),
        "seconds_per_rollout_step": mean("seconds/total", rows),
        "tokens_per_second": mean("tokens_per_second/total", rows),
        "world_size": world_size,
        "zero_stage": zero_stage,
        "sync_logprob_gap_max": max((row["sync/logprob_gap_max"] for row in rows), default=None),
    }
    folder.summary.write_text(json.dumps(summary, indent=2) + "\n")
    return summary
