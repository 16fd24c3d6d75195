"""`summary.json` and the table at the end of a run."""

import json
from datetime import timedelta
from pathlib import Path

from justrl_trl.jsonl import read_jsonl
from justrl_trl.runs.folder import RunFolder


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


def table_lines(summary: dict, folder: RunFolder, checkpoint: Path | None) -> list[str]:
    """First against last, and where everything is."""

    def row(name: str, first, last, form: str) -> str:
        cells = ["-" if value is None else format(value, form) for value in (first, last)]
        return f"  {name:<30}{cells[0]:>10}{cells[1]:>10}"

    lines = [
        f"done: {summary['rollout_steps']} rollout steps ({summary['optimizer_steps']} optimizer steps) in "
        f"{timedelta(seconds=round(summary['seconds']))}",
        f"  {'':<30}{'first':>10}{'last':>10}",
        row("mean reward, 3 rollout steps", summary["reward_first"], summary["reward_last"], "+.3f"),
        row("held-out accuracy", summary["heldout_accuracy_first"], summary["heldout_accuracy_last"], ".1%"),
        row("policy entropy", summary["entropy_first"], summary["entropy_last"], ".3f"),
        row("response length, tokens", summary["response_length_first"], summary["response_length_last"], ",.1f"),
    ]
    files = [folder.figure, folder.metrics, folder.samples, folder.summary, *([checkpoint] if checkpoint else [])]
    return [*lines, *(f"  wrote {file}" for file in files if file.exists())]
