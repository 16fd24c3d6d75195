"""Read problems from a Hub dataset, a file or a folder, in any known layout.

`open_source` finds and opens one, `problem_columns` picks its two columns, `problem_text` and `answer_text` read their cells.
Nothing is checked beyond that: what makes a usable row is the business of `data`. JSON files are read whole, everything
else in batches. Every failure is one paragraph with the name, the reason and the remedy.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from justrl_trl.errors import DataError
from justrl_trl.grading.strict import last_boxed

# Column pairs (problem, answer); the first pair present wins. `answer` goes before `solution` because sets that have
# both (HuggingFaceH4/aime_2024, MATH-500) keep a worked solution in the latter.
_SCHEMAS = (
    ("problem", "answer"),  # MathArena sets, JustRL's HMMT25, BRUMO25 and CMIMC25
    ("question", "answer"),  # GSM8K
    ("prompt", "answer"),
    ("prompt", "solution"),  # open-r1/DAPO-Math-17k-Processed
    ("prompt", "reward_model"),  # BytedTsinghua-SIA/DAPO-Math-17k, JustRL's other benchmark files
    ("problem", "solution"),  # what load_problems returns
)
_FILE_TYPES = (".parquet", ".jsonl", ".json")
_GSM8K_MARK = "####"
_SHOWN_FILES = 10


@dataclass(frozen=True)
class Source:
    """A dataset that can be read by columns, in batches, as often as needed."""

    name: str
    columns: frozenset[str]
    batches: Callable[[list[str], int], Iterator[dict[str, list]]]  # columns, n -> {column: [up to n values]}


def _open_hub(name: str, config: str | None, split: str, revision: str | None) -> Source:
    """A dataset of the Hub, read through the `datasets` cache. Remote code is never run."""
    try:
        dataset = datasets.load_dataset(name, config, split=split, revision=revision)
    except (DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
        # Not found, gated, offline, unknown config or split: the library's own text lists what exists.
        tried = ", ".join(
            f"{key} {value!r}" for key, value in (("config", config), ("split", split), ("revision", revision)) if value
        )
        raise DataError(
            f"dataset {name!r} ({tried}) could not be loaded: no file or folder of that name here, and the Hub gave "
            f"{type(error).__name__}: {' '.join(str(error).split())}. Check the name, config and split; without "
            f"network, give the path of a downloaded {', '.join(_FILE_TYPES)} file."
        ) from error
    return Source(name, frozenset(dataset.column_names), lambda cols, size: dataset.select_columns(cols).iter(size))


def _split_files(folder: Path, split: str) -> list[Path]:
    """Files of one split: `test.parquet` or `test-00000-of-00002.parquet`, in the folder or in its `data` folder."""
    found = sorted(p for where in (folder, folder / "data") for p in where.glob("*") if p.suffix in _FILE_TYPES)
    for kind in _FILE_TYPES:
        files = [p for p in found if p.suffix == kind and (p.stem == split or p.stem.startswith(f"{split}-"))]
        if files:
            return files
    listing = ", ".join(str(p.relative_to(folder)) for p in found[:_SHOWN_FILES]) or f"no {'/'.join(_FILE_TYPES)} file"
    raise DataError(
        f"folder {str(folder)!r} has no {split!r} split: looked for {split}.parquet, .jsonl, .json, found {listing}. "
        "Name one of its splits, or give the path of the file itself."
    )


def _parquet_batches(files: list[Path], columns: list[str], size: int) -> Iterator[dict[str, list]]:
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(size, columns=columns):
            yield batch.to_pydict()


def _read_json(path: Path) -> list[dict]:
    """Rows of a JSON-lines file, or of a JSON file that holds one list of objects. Errors name the line, from 1."""
    text = path.read_text(encoding="utf-8")
    whole = text.lstrip().startswith("[")
    rows, place = [], ""
    try:
        for number, line in [(1, text)] if whole else enumerate(text.split("\n"), 1):
            if line.strip():
                place = "" if whole else f", line {number}"
                value = json.loads(line)
                # A lone surrogate such as "\\ud800" parses as JSON, but neither Arrow nor a tokenizer can encode it.
                json.dumps(value, ensure_ascii=False).encode()
                rows += value if whole else [value]
    except ValueError as error:
        raise DataError(f"{str(path)!r}{place}: not valid JSON text ({error}). Fix or remove that line.") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f"{str(path)!r}, row {number}: {type(row).__name__} instead of an object. Each row must have named "
                'columns, such as {"problem": "...", "answer": "..."}.'
            )
    return rows


def _open_local(path: Path, split: str) -> Source:
    """A file, whatever `split` says, or a folder with one file per split."""
    name = str(path)
    if not path.exists():
        raise DataError(
            f"{name!r} does not exist (looked from {str(Path.cwd())!r}). Give the path of a {', '.join(_FILE_TYPES)} "
            "file, of a folder with such files, or the name of a Hub dataset."
        )
    files = _split_files(path, split) if path.is_dir() else [path]
    if files[0].suffix not in _FILE_TYPES:
        raise DataError(f"{name!r} has an unknown file type: convert it to one of {', '.join(_FILE_TYPES)}.")
    try:
        if files[0].suffix == ".parquet":
            columns = frozenset(pq.read_schema(files[0]).names)
            return Source(name, columns, lambda cols, size: _parquet_batches(files, cols, size))
        rows = [row for file in files for row in _read_json(file)]
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{name!r} cannot be read: {error}. Check the file, or copy it again.") from error

    def json_batches(columns: list[str], size: int) -> Iterator[dict[str, list]]:
        for start in range(0, len(rows), size):
            yield {column: [row.get(column) for row in rows[start : start + size]] for column in columns}

    return Source(name, frozenset().union(*rows), json_batches)


def open_source(name: str, config: str | None, split: str, revision: str | None) -> Source:
    """The source behind `name`: a local path if it looks like one or exists, else a Hub dataset.

    Raises:
        DataError: unknown or unreadable source; `config` or `revision` given for a local path.
    """
    path = Path(name).expanduser()
    if path.exists() or path.suffix in _FILE_TYPES or str(name).startswith(("/", ".", "~")):
        if config or revision:
            raise DataError(
                f"{str(name)!r} is a local path, so config={config!r} and revision={revision!r} have no meaning: "
                "remove them, or give the name of a Hub dataset."
            )
        return _open_local(path, split)
    return _open_hub(name, config, split, revision)


def problem_columns(source: Source) -> tuple[str, str]:
    """Names of the columns that hold problem and answer. Raises DataError when no known pair is there."""
    for problem_column, answer_column in _SCHEMAS:
        if {problem_column, answer_column} <= source.columns:
            return problem_column, answer_column
    pairs = ", ".join(f"{problem}/{answer}" for problem, answer in _SCHEMAS)
    raise DataError(
        f"{source.name!r} has columns {', '.join(sorted(source.columns)) or '(none)'}: no problem and answer there. "
        f"Rename two columns to one of these pairs: {pairs}."
    )


def is_gsm8k(source: Source, columns: tuple[str, str], size: int) -> bool:
    """Whether answers are worked solutions that end in `#### N`; other question/answer sets hold the bare answer."""
    if columns != ("question", "answer"):
        return False
    cells = (cell for batch in source.batches(["answer"], size) for cell in batch["answer"] if isinstance(cell, str))
    return any(_GSM8K_MARK in cell or "\n" in cell.strip() for cell in cells)


def problem_text(cell: Any) -> str:
    """Text of a string or of the first chat message (the reference drops the others). Raises ValueError."""
    if isinstance(cell, list):
        cell = cell[0].get("content") if cell and isinstance(cell[0], dict) else None
    if cell is not None and not isinstance(cell, str):
        raise ValueError(f"prompt is {type(cell).__name__} and not text")
    return cell or ""


def answer_text(cell: Any, gsm8k: bool) -> str:
    """Bare answer text. Raises ValueError with the reason, never converts a number."""
    if isinstance(cell, dict):
        cell = cell.get("ground_truth")
    if cell is not None and not isinstance(cell, str):
        raise ValueError(f"answer is {type(cell).__name__} and not text")
    answer = (cell or "").strip()
    if answer and gsm8k:
        _, mark, answer = answer.rpartition(_GSM8K_MARK)
        if not mark:
            raise ValueError(f"no {_GSM8K_MARK!r} before the final answer")
        answer = answer.strip().replace(",", "")
    if answer.startswith("\\boxed{") and last_boxed(answer) == answer[len("\\boxed{") : -1]:
        answer = answer[len("\\boxed{") : -1].strip()
    if not answer:
        raise ValueError("no answer")
    return answer
