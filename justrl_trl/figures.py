"""`dynamics.png`: the run at a glance, laid out like Figure 2 of the paper (entropy, reward, response length)."""

from pathlib import Path

from matplotlib.figure import Figure

_BLUE, _GREY, _RED = "#1f5fa8", "#9db4cf", "#c0392b"
_PANELS = (
    ("entropy", "Policy entropy", "nats per token"),
    ("reward", "Mean reward", "-1 wrong ... +1 right"),
    ("completions/mean_length", "Response length", "tokens"),
)


def plot_dynamics(rows: list[dict], heldout: list[dict], path: Path) -> None:
    """Draw the three panels; raw values in grey, a running mean in blue, held-out accuracy as red dots on the reward.

    Args:
        rows: `metrics.jsonl`, one dict per rollout step.
        heldout: `heldout.jsonl`.
        path: PNG to write (replaced atomically); nothing is written while there is nothing to draw.
    """
    if not rows:
        return
    figure = Figure(figsize=(13, 3.9), layout="constrained")
    for axis, (name, title, unit) in zip(figure.subplots(1, 3), _PANELS, strict=True):
        points = [(row["rollout_step"], row[name]) for row in rows if row.get(name) is not None]
        steps, values = zip(*points, strict=True) if points else ((), ())
        axis.plot(steps, values, color=_GREY, linewidth=1, marker="o" if len(values) < 3 else None)
        axis.plot(steps, running_mean(values, max(1, len(values) // 12)), color=_BLUE, linewidth=2.2)
        axis.set_title(title, fontsize=12)
        axis.set_xlabel("rollout step")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if name == "reward":
            _mark_heldout(axis, heldout)
        if name == "completions/mean_length":
            _mark_truncated(axis, rows)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    temporary.replace(path)


def running_mean(values, window: int) -> list[float]:
    """Mean of each value with up to `window` before and after it."""
    return [
        sum(values[max(0, i - window) : i + window + 1]) / len(values[max(0, i - window) : i + window + 1])
        for i in range(len(values))
    ]


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
