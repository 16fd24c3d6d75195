"""Callback that writes metrics, samples and the figure of every rollout step into the run folder."""

import math
import time
from collections.abc import Callable

from transformers import TrainerCallback

from justrl_trl.jsonl import append_jsonl, read_jsonl
from justrl_trl.reports.figures import plot_dynamics
from justrl_trl.reports.paper import family_of, figure1
from justrl_trl.runs.folder import RunFolder

_FIGURE_EVERY_SECONDS = 60.0


class RecordRun(TrainerCallback):
    """Writes the run folder while training goes on.

    Args:
        folder: where to.
        model: name of the base model; the paper's curve is drawn beside validation where it is the paper's model.
        trainer: the `JustRLTrainer`, whose completion logs are read; set after construction.
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
        if state.is_world_process_zero:
            self._draw()

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


def _json_ready(logs: dict) -> dict:
    """JSON has no infinity and no NaN: a gradient norm that is not finite becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
