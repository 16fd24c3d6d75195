"""`dynamics.png`: entropy, reward and response length (Figure 2 of the paper), and validation (Figure 1)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

_BLUE, _GREY, _RED = "#1f5fa8", "#9db4cf", "#c0392b"
_PAPER_BENCHMARK = "aime24"  # of Figure 1
_PANELS = (
    ("entropy", "Policy entropy", "nats per token"),
    ("reward", "Mean reward", "-1 wrong ... +1 right"),
    ("completions/mean_length", "Response length", "tokens"),
)


def plot_dynamics(
    rows: list[dict], heldout: list[dict], path: Path, validation: Sequence[dict] = (), paper: Mapping[int, float] | None = None
) -> None:
    """Draw the three panels, and a fourth of the benchmarks' avg@N; raw values in grey, a running mean in blue, held-out
    accuracy as red dots on the reward.

    Args:
        rows: `metrics.jsonl`, one dict per rollout step.
        heldout: `heldout.jsonl`.
        path: PNG to write (replaced atomically); nothing is written while there is nothing to draw.
        validation: `validation.jsonl`.
        paper: the paper's AIME 2024 avg@32 in percent by rollout step (Figure 1), drawn beside our own.
    """
    if not rows:
        return
    panels = 4 if validation else 3
    figure = Figure(figsize=(13 / 3 * panels, 3.9), layout="constrained")
    axes = figure.subplots(1, panels)
    if validation:
        _draw_validation(axes[3], validation, paper or {})
    for axis, (name, title, unit) in zip(axes, _PANELS, strict=False):
        points = [(row["rollout_step"], row[name]) for row in rows if row.get(name) is not None]
        steps, values = zip(*points, strict=True) if points else ((), ())
        axis.plot(steps, values, color=_GREY, linewidth=1, marker="o" if len(values) < 3 else None)
        axis.plot(steps, running_mean(values, max(1, len(values) // 12)), color=_BLUE, linewidth=2.2)
        _dress(axis, title, unit)
        if name == "reward":
            _mark_heldout(axis, heldout)
        if name == "completions/mean_length":
            _mark_truncated(axis, rows)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    temporary.replace(path)


def _dress(axis, title: str, unit: str) -> None:
    axis.set_title(title, fontsize=12)
    axis.set_xlabel("rollout step")
    axis.set_ylabel(unit)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_validation(axis, validation: Sequence[dict], paper: Mapping[int, float]) -> None:
    """A line per benchmark with its standard error; the paper's AIME 2024 dotted, a little further than this run has come."""
    _dress(axis, "Validation", "avg@N, %")
    last = max(row["rollout_step"] for row in validation)
    for name in dict.fromkeys(row["benchmark"] for row in validation):
        own = [row for row in validation if row["benchmark"] == name]
        steps, values = [row["rollout_step"] for row in own], [100 * row["avg"] for row in own]
        (line,) = axis.plot(steps, values, marker="o", markersize=4, linewidth=1.6, label=f"{name} avg@{own[0]['samples']}")
        errors = [100 * (row["stderr"] or 0.0) for row in own]
        low, high = ([v + side * e for v, e in zip(values, errors, strict=True)] for side in (-1, 1))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        reached = {step: value for step, value in sorted(paper.items()) if step <= max(1.2 * last, 500)}
        if name == _PAPER_BENCHMARK and reached:
            axis.plot(*zip(*reached.items(), strict=True), ":", color=line.get_color(), linewidth=1.8, label="paper, Figure 1")
    axis.set_ylim(0, 100)
    axis.legend(frameon=False, loc="best", fontsize=9)


def running_mean(values, window: int) -> list[float]:
    """Mean of each value with up to `window` before and after it."""
    if not values:
        return []
    kernel, inside = np.ones(2 * window + 1), slice(window, window + len(values))
    return (np.convolve(values, kernel)[inside] / np.convolve(np.ones(len(values)), kernel)[inside]).tolist()


def _mark_heldout(axis, heldout: list[dict]) -> None:
    """Held-out accuracy a on the reward's scale, 2 a - 1, with the number beside it."""
    if not heldout:
        return
    steps, scores = [row["rollout_step"] for row in heldout], [2 * row["accuracy"] - 1 for row in heldout]
    axis.plot(steps, scores, "D", color=_RED, markersize=6, label="held-out problems", clip_on=False)
    for row, step, score in zip(heldout, steps, scores, strict=True):
        side, offset = ("left", 6) if step == 0 else ("right", -6)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        place = {"xytext": (offset, -20), "textcoords": "offset points", "ha": side}
        axis.annotate(f"{row['accuracy']:.0%}", (step, score), color=_RED, bbox=box, **place)
    axis.legend(frameon=False, loc="lower right")


def _mark_truncated(axis, rows: list[dict]) -> None:
    """Share of responses cut at the limit, on a second scale."""
    shares = [
        (row["rollout_step"], 100 * row["completions/clipped_ratio"])
        for row in rows
        if row.get("completions/clipped_ratio") is not None
    ]
    if shares:
        twin = axis.twinx()
        twin.plot(*zip(*shares, strict=True), color=_RED, linewidth=1, alpha=0.6)
        twin.set_ylabel("cut at the limit, %", color=_RED)
        twin.set_ylim(bottom=0, top=max(5.0, 1.15 * max(share for _, share in shares)))
        twin.spines["top"].set_visible(False)
