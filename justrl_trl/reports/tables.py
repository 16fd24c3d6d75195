"""Results of an evaluation as Markdown, beside the paper's.

Columns are padded, so the text reads as well in a terminal as on GitHub. What would make the comparison unfair is said under
the table and not left to the reader: another grader, another N, part of the problems, an average over fewer than nine.
"""

from collections.abc import Callable
from typing import Any

from justrl_trl.data.benchmarks import BENCHMARKS
from justrl_trl.reports.paper import family_of, table_number, table_rows
from justrl_trl.reports.scores import BenchmarkScore, average

_NONE = "-"
_PAPER_GRADER = "the rule grader, then CompassVerifier-3B on what it rejects"

# Heading and cell of each column of the details; a score is of the benchmark with this name.
_DETAILS: dict[str, Callable[[str, BenchmarkScore], str]] = {
    "benchmark": lambda name, s: BENCHMARKS[name].title,
    "problems": lambda name, s: f"{s.problems}",
    "N": lambda name, s: f"{s.samples}",
    "avg@N": lambda name, s: _percent(s.avg, 2),
    "95 % interval": lambda name, s: _NONE if s.ci_low is None else f"{_percent(s.ci_low, 2)} to {_percent(s.ci_high, 2)}",
    "pass@N": lambda name, s: _percent(s.pass_at[s.samples], 2),
    "maj@N": lambda name, s: _percent(s.maj_at[s.samples], 2),
    "mean tokens": lambda name, s: f"{s.mean_tokens:,.0f}",
    "truncated": lambda name, s: _percent(s.truncated, 1),
    "no box": lambda name, s: _percent(s.no_box, 1),
    "none right": lambda name, s: _percent(s.solve_none, 1),
    "all right": lambda name, s: _percent(s.solve_all, 1),
}

_DETAILS_NOTE = (
    "Interval: bootstrap over problems. maj@N: majority vote, ties shared. Percent of responses: truncated (stopped by the "
    'length limit) and no box ("boxed" does not appear). Percent of problems: none right, all right.'
)


def results_table(scores: dict[str, BenchmarkScore], model: str, settings: dict[str, Any]) -> str:
    """Markdown of one evaluation, all scores and shares in percent.

    Args:
        scores: by benchmark name; benchmarks appear in the paper's order, whatever the order here.
        model: as evaluated; its name picks the paper's table (`paper.family_of`), none for other models.
        settings: `"grader"`, how responses were graded, in words; every other entry is listed as `name value`.

    Raises:
        ValueError: no score, an unknown benchmark, or no `"grader"`.
    """
    unknown = [name for name in scores if name not in BENCHMARKS]
    if unknown or not scores:
        raise ValueError(f"no table from benchmarks {unknown or '(none)'}: score one or more of {', '.join(BENCHMARKS)}.")
    if "grader" not in settings:
        raise ValueError("settings have no 'grader': say how responses were graded, scores of two graders do not compare.")
    scores = {name: scores[name] for name in BENCHMARKS if name in scores}
    family = family_of(model)
    parts = ["## Scores, avg@N in percent", _comparison(scores, model, family), _notes(scores, family, settings)]
    details = [list(_DETAILS), *([cell(name, s) for cell in _DETAILS.values()] for name, s in scores.items())]
    parts += ["## Details", markdown_table(details), _DETAILS_NOTE]
    if max(s.samples for s in scores.values()) > 1:
        parts += ["## pass@k and maj@k by k, in percent", _by_k(scores)]
    return "\n\n".join(parts) + "\n"


def _comparison(scores: dict[str, BenchmarkScore], model: str, family: str | None) -> str:
    """Our row and the paper's, over the benchmarks that were scored."""
    complete = len(scores) == len(BENCHMARKS)
    heading = ["model", *(BENCHMARKS[name].folder for name in scores), "average" if complete else f"average of {len(scores)}"]
    ours = [*((s.avg, s.stderr) for s in scores.values()), average(scores.values())]
    rows = [heading, [f"{model} (this run)", *(_percent(avg, 2) + _plus_minus(error) for avg, error in ours)]]
    for name, values in table_rows(family).items() if family else ():
        shown = [values[benchmark] for benchmark in scores]
        mean = values["avg"] if complete else None if None in shown else sum(shown) / len(shown)
        rows.append([name, *(_NONE if value is None else f"{value:.2f}" for value in [*shown, mean])])
    return markdown_table(rows)


def _notes(scores: dict[str, BenchmarkScore], family: str | None, settings: dict[str, Any]) -> str:
    """What a reader must know to compare, one line each."""
    other_n = [f"{BENCHMARKS[n].folder} {s.samples}, not {BENCHMARKS[n].samples}" for n, s in scores.items() if _other_n(n, s)]
    parts = [f"{BENCHMARKS[n].folder} {s.problems} of {BENCHMARKS[n].problems}" for n, s in scores.items() if _part(n, s)]
    rest = [f"{name} {value}" for name, value in settings.items() if name != "grader"]
    notes = ["±: one standard error, clustered by problem; of the average, with the benchmarks taken as independent."]
    if family:
        source = f"The other rows are Table {table_number(family)} of arXiv 2512.16649, graded by {_PAPER_GRADER}."
    else:
        source = "The paper has no table for this model."
    notes.append(f"This run was graded by {settings['grader']}. {source}")
    if len(scores) < len(BENCHMARKS):
        notes.append(
            f"The average is over the {len(scores)} of {len(BENCHMARKS)} benchmarks shown, in every row; the paper prints only "
            "that over all."
        )
    if other_n:
        notes.append(f"Responses per problem (N) differ from the paper's: {'; '.join(other_n)}.")
    if parts:
        notes.append(f"Only part of the problems was sampled, which compares with no published number: {'; '.join(parts)}.")
    if rest:
        notes.append(f"Settings: {', '.join(rest)}.")
    return "\n".join(f"- {note}" for note in notes)


def _other_n(name: str, s: BenchmarkScore) -> bool:
    return s.samples != BENCHMARKS[name].samples


def _part(name: str, s: BenchmarkScore) -> bool:
    return s.problems != BENCHMARKS[name].problems


def _by_k(scores: dict[str, BenchmarkScore]) -> str:
    """Two rows per benchmark, one column per k; empty where k is above that benchmark's N."""
    ks = sorted({k for s in scores.values() for k in s.pass_at})
    rows = [["benchmark", "", *(f"k = {k}" for k in ks)]]
    for name, s in scores.items():
        for title, measure, values in ((BENCHMARKS[name].title, "pass@k", s.pass_at), ("", "maj@k", s.maj_at)):
            rows.append([title, measure, *(_percent(values[k], 2) if k in values else "" for k in ks)])
    return markdown_table(rows)


def _percent(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f}"


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {_percent(error, 2)}"


def markdown_table(rows: list[list[str]]) -> str:
    """A padded table: heading first, the first column left, the others right. A `|` inside a cell is escaped."""
    rows = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
