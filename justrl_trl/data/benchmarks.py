"""The paper's nine benchmarks, from the Hub at a pinned commit or from a folder: text problems with text answers.

No problem text is kept in this repository. `load` reads a benchmark from the Hub, or from `<data_dir>/<folder>/test.parquet`
with the folder names of `data/` in thunlp/JustRL, and checks its number of rows. Local files may have any column layout that
`sources` knows; JustRL's own come in two (`prompt`/`reward_model` and `problem`/`answer`).

Problem and answer are stripped, as JustRL `evals/gen_vllm.py` does, and otherwise kept raw: AIME 2024 in JustRL's files has
`\\boxed{204}` as its answer, which is the grader's business. Only two things are rewritten, both on the Hub's side. A whole
number becomes its digits (amc23 stores 27.0, aime_2025 stores 70; JustRL's files `27` and `70`). OlympiadBench's `context` is
put before the question with one line break between them, as in JustRL's file.

The Hub's wording may differ from JustRL's in detail. To compare with the paper digit by digit, give the folder.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from justrl_trl.data.sources import Source, open_source, problem_columns, problem_text
from justrl_trl.errors import DataError

_BATCH_ROWS = 1_000
_SHOWN_ROWS = 10
_FILE = "test.parquet"
_OLYMPIAD = ("question", "final_answer")  # Hothan/OlympiadBench: the answer is a list of strings
_CONTEXT = "context"
_MATH_ARENA = "CC BY-NC-SA 4.0"
_UNSTATED = "none stated"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: where it lies, how many problems it must have, and how often the paper samples each of them."""

    name: str  # as typed, "aime24"
    title: str  # "AIME 2024"
    folder: str  # of the local copy, "AIME24"
    hub_id: str
    config: str | None  # of the Hub dataset
    split: str  # of the Hub dataset
    revision: str | None  # commit of the Hub dataset
    problems: int  # rows, checked
    samples: int  # N of the paper's avg@N: responses per problem
    license: str  # as the Hub states it


# Order of the paper's Tables 3 and 5. N: JustRL `evals/gen_vllm.py`; the paper's section 4.1 says 32 for all nine.
# fmt: off
BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("aime24", "AIME 2024", "AIME24", "HuggingFaceH4/aime_2024", None, "train",
                  "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", 30, 32, _UNSTATED),
        Benchmark("aime25", "AIME 2025", "AIME25", "MathArena/aime_2025", None, "train",
                  "c94da77eb22bbd6439e62a323bec18493a421302", 30, 32, _MATH_ARENA),
        Benchmark("amc23", "AMC 2023", "AMC23", "math-ai/amc23", None, "test",
                  "80815d37005feb82cd7f8fbc6901d5d3eff43057", 40, 32, _UNSTATED),
        Benchmark("math500", "MATH-500", "MATH-500", "HuggingFaceH4/MATH-500", None, "test",
                  "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", 500, 4, _UNSTATED),
        Benchmark("minerva", "Minerva Math", "Minerva", "math-ai/minervamath", None, "test",
                  "ee46ddc498933b1977577953250ca5c66be64f96", 272, 4, _UNSTATED),
        Benchmark("olympiad", "OlympiadBench", "Olympiad-Bench", "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train",
                  "91184b52131e7fc9455fef848035173aea8cc01a", 674, 4, "Apache-2.0"),
        Benchmark("hmmt25", "HMMT Feb 2025", "HMMT25", "MathArena/hmmt_feb_2025", None, "train",
                  "6fdc4277120810ff75aa22d2d5489b91f7a262a1", 30, 32, _MATH_ARENA),
        Benchmark("brumo25", "BRUMO 2025", "BRUMO25", "MathArena/brumo_2025", None, "train",
                  "6de9bc0987f5710c6376ee980e1483dbeb55cfda", 30, 32, _MATH_ARENA),
        Benchmark("cmimc25", "CMIMC 2025", "CMIMC25", "MathArena/cmimc_2025", None, "train",
                  "8f27517ce4ad1d05e023c0e7eca4344754ba2a04", 40, 32, _MATH_ARENA),
    )
}
# fmt: on
_GROUPS = ("all", "paper")  # both mean the nine


@dataclass(frozen=True)
class Problem:
    """One problem; `index` is its row in the source, from 0."""

    index: int
    problem: str
    answer: str


def select(names: str | list[str]) -> list[Benchmark]:
    """Benchmarks by name, in the order named, each once: `"all"` (or `"paper"`), `"aime24,math500"` or a list of names.

    Raises:
        DataError: an unknown name, or no name at all.
    """
    typed = [name.strip().lower() for item in ([names] if isinstance(names, str) else names) for name in item.split(",")]
    typed = [name for name in typed if name]
    unknown = [name for name in typed if name not in BENCHMARKS and name not in _GROUPS]
    if unknown or not typed:
        named = (
            f"unknown benchmark{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}" if typed else "no benchmark named"
        )
        raise DataError(f"{named}: choose from {', '.join(BENCHMARKS)}, separated by commas, or 'all' for these nine.")
    chosen = [name for item in typed for name in (BENCHMARKS if item in _GROUPS else [item])]
    return [BENCHMARKS[name] for name in dict.fromkeys(chosen)]


def load(benchmark: Benchmark, data_dir: str | Path | None = None) -> list[Problem]:
    """All problems of a benchmark, in the order of the source.

    Args:
        data_dir: folder with `<benchmark.folder>/test.parquet`; None reads the Hub (or its cache) at `benchmark.revision`.

    Raises:
        DataError: missing file, unreachable Hub, unknown columns, cells without text, or another number of rows.
    """
    source = _open(benchmark, data_dir)
    try:
        problems = _read(source)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{source.name!r} cannot be read: {reason}. Check the file, or copy it again.") from error
    if len(problems) != benchmark.problems:
        raise DataError(
            f"{source.name!r} has {len(problems):,} rows, {benchmark.title} has {benchmark.problems:,}: a score over other "
            f"problems compares with nothing. Use data/{benchmark.folder}/{_FILE} of thunlp/JustRL, or {benchmark.hub_id} "
            f"at revision {benchmark.revision}."
        )
    return problems


def _open(benchmark: Benchmark, data_dir: str | Path | None) -> Source:
    """The source of a benchmark; a missing local file is an error and never a reason to ask the Hub."""
    if data_dir is None:
        return open_source(benchmark.hub_id, benchmark.config, benchmark.split, benchmark.revision)
    path = Path(data_dir).expanduser() / benchmark.folder / _FILE
    if not path.is_file():
        there = [b.name for b in BENCHMARKS.values() if (path.parents[1] / b.folder / _FILE).is_file()]
        raise DataError(
            f"{benchmark.title}: no file {str(path)!r} (looked from {str(Path.cwd())!r}; the folder has "
            f"{', '.join(there) or 'none of the benchmarks'}). Copy data/{benchmark.folder}/{_FILE} of thunlp/JustRL there, "
            f"leave {benchmark.name} out, or give no data_dir to read {benchmark.hub_id} from the Hub."
        )
    return open_source(str(path), None, benchmark.split, None)


def _cells(source: Source) -> Iterator[tuple[Any, Any, Any]]:
    """(context, problem, answer) cells of every row; the context is None where the source has no such column."""
    olympiad = set(_OLYMPIAD) <= source.columns
    problem_column, answer_column = _OLYMPIAD if olympiad else problem_columns(source)
    context = [_CONTEXT] if olympiad and _CONTEXT in source.columns else []
    for batch in source.batches([*context, problem_column, answer_column], _BATCH_ROWS):
        contexts = batch[_CONTEXT] if context else [None] * len(batch[problem_column])
        yield from zip(contexts, batch[problem_column], batch[answer_column], strict=True)


def _read(source: Source) -> list[Problem]:
    """Every row as a `Problem`; or a DataError that names every kind of bad row."""
    problems, bad = [], {}
    for index, (context, problem, answer) in enumerate(_cells(source)):
        try:
            problems.append(Problem(index, _problem(context, problem), _answer(answer)))
        except ValueError as reason:
            bad.setdefault(str(reason), []).append(index)
    if bad:
        kinds = (
            f"{reason} in row {', '.join(map(str, rows[:_SHOWN_ROWS]))}{', ...' * (len(rows) > _SHOWN_ROWS)}"
            for reason, rows in bad.items()
        )
        raise DataError(
            f"{source.name!r} has rows that cannot be used: {'; '.join(kinds)} (counted from 0). Copy the file again, or "
            "store problem and answer as text."
        )
    return problems


def _problem(context: Any, cell: Any) -> str:
    """Problem text, stripped, behind its context if there is one. Raises ValueError."""
    text = problem_text(cell).strip()
    if not text:
        raise ValueError("empty problem")
    return f"{problem_text(context).strip()}\n{text}".strip()


def _answer(cell: Any) -> str:
    """Answer text, stripped. Whole numbers become their digits, lists are joined with commas. Raises ValueError."""
    if isinstance(cell, dict):
        cell = cell.get("ground_truth")
    if isinstance(cell, list):
        return ", ".join(map(_answer, cell)) or _answer(None)
    if isinstance(cell, int | float) and not isinstance(cell, bool) and cell == cell // 1:
        cell = str(int(cell))  # exact: a float is rewritten only where it is a whole number, others are refused below
    if cell is not None and not isinstance(cell, str):
        raise ValueError(f"answer is the {type(cell).__name__} {cell!r} and neither text nor a whole number")
    if not (cell or "").strip():
        raise ValueError("no answer")
    return cell.strip()
