"""Problems in, prompts out: before training every row is text with a text answer, or the bad rows are named.

`load_problems` reads a Hub dataset or a local file in any layout the JustRL recipe meets and reduces it to three
columns: `problem`, `solution` and `row` (the row number in the source, from 0). `prepare_problems` removes repeats,
and `to_training_dataset` appends the boxed instruction and drops prompts that are too long. Nothing is repaired in
silence: an empty prompt, a missing answer or an answer that is a number stops the run, because the reward compares
text exactly and such a row could only ever pay -1.

Three things differ from a plain `load_dataset`. DAPO's wrapper, which asks for "Answer: ...", is stripped wherever it
is found, as JustRL's author says they did (the released code does not). A gold answer that is one whole
`\\boxed{204}`, as in JustRL's AIME24 file, becomes `204`: the strict rule compares the bare content. Repeats are
removed, since the public DAPO file holds each of its 17,398 problems about 100 times (1,791,700 rows); skip
`prepare_problems` to keep them.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from .rewards import last_boxed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
BOXED_SUFFIX = "\n\n" + BOXED_INSTRUCTION  # training: JustRL `verl/utils/dataset/rl_dataset.py`
EVAL_BOXED_SUFFIX = " " + BOXED_INSTRUCTION  # evaluation: JustRL `evals/gen_vllm.py` joins with one space instead
DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_POSTFIX = '\n\nRemember to put your answer on its own line after "Answer:".'

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
_BATCH_ROWS = 10_000  # rows held as Python objects at a time; 1.79M DAPO rows at once would take several GB
_SHOWN_ROWS = 10
_PROBLEM_TABLE = pa.schema([("problem", pa.string()), ("solution", pa.string()), ("row", pa.int64())])
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_TRAINING_TABLE = pa.schema([("prompt", _MESSAGES), ("solution", pa.string()), ("row", pa.int64())])


class DataError(ValueError):
    """The data cannot be used; the message names the source, the reason, the rows and the remedy."""


@dataclass(frozen=True)
class DataReport:
    """What happened to the rows between the source and the trainer."""

    rows: int  # rows read from the source
    kept: int  # rows that remain
    duplicates: int = 0  # rows dropped because an earlier row has the same problem
    conflicts: tuple[tuple[int, int], ...] = ()  # (kept row, first row that disagrees), one pair per such problem
    overlong: int = 0  # rows dropped because the templated prompt is too long
    max_prompt_length: int | None = None  # tokens; None before `to_training_dataset`

    def lines(self) -> list[str]:
        """The report for people, one fact per line, e.g. `17,398 problems kept of 1,791,700 rows (...)`."""
        facts = [f"{self.duplicates:,} duplicates", f"{len(self.conflicts):,} with conflicting answers"]
        if self.max_prompt_length is not None:
            facts.append(f"{self.overlong:,} over {self.max_prompt_length:,} tokens")
        lines = [f"{self.kept:,} problems kept of {self.rows:,} rows ({', '.join(facts)})"]
        if self.conflicts:
            pairs = ", ".join(f"{kept} over {other}" for kept, other in self.conflicts[:_SHOWN_ROWS])
            more = len(self.conflicts) - _SHOWN_ROWS
            lines.append(
                f"conflicting answers: the first occurrence was kept, row {pairs}" + f" and {more:,} more" * (more > 0)
            )
        return lines


@dataclass(frozen=True)
class _Source:
    """A dataset that can be read by columns, in batches, as often as needed."""

    name: str
    columns: frozenset[str]
    batches: Callable[[list[str]], Iterator[dict[str, list]]]  # column names -> {column: [up to _BATCH_ROWS values]}


def _open_hub(name: str, config: str | None, split: str, revision: str | None) -> _Source:
    """A dataset of the Hub, read through the `datasets` cache. Remote code is never run."""
    try:
        dataset = datasets.load_dataset(name, config, split=split, revision=revision)
    except (DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
        # Not found, gated, offline, unknown config or split: the library's own text lists what exists.
        tried = ", ".join(
            f"{key} {value!r}"
            for key, value in (("config", config), ("split", split), ("revision", revision))
            if value
        )
        raise DataError(
            f"dataset {name!r} ({tried}) could not be loaded: no file or folder of that name here, and the Hub gave "
            f"{type(error).__name__}: {' '.join(str(error).split())}. Check the name, config and split; without "
            f"network, give the path of a downloaded {', '.join(_FILE_TYPES)} file."
        ) from error
    return _Source(name, frozenset(dataset.column_names), lambda cols: dataset.select_columns(cols).iter(_BATCH_ROWS))


def _split_files(folder: Path, split: str) -> list[Path]:
    """Files of one split: `test.parquet` or `test-00000-of-00002.parquet`, in the folder or in its `data` folder."""
    found = sorted(p for where in (folder, folder / "data") for p in where.glob("*") if p.suffix in _FILE_TYPES)
    for kind in _FILE_TYPES:
        files = [p for p in found if p.suffix == kind and (p.stem == split or p.stem.startswith(f"{split}-"))]
        if files:
            return files
    listing = ", ".join(str(p.relative_to(folder)) for p in found[:_SHOWN_ROWS]) or f"no {'/'.join(_FILE_TYPES)} file"
    raise DataError(
        f"folder {str(folder)!r} has no {split!r} split: looked for {split}.parquet, .jsonl, .json, found {listing}. "
        "Name one of its splits, or give the path of the file itself."
    )


def _parquet_batches(files: list[Path], columns: list[str]) -> Iterator[dict[str, list]]:
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(_BATCH_ROWS, columns=columns):
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


def _open_local(path: Path, split: str) -> _Source:
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
            return _Source(name, columns, lambda cols: _parquet_batches(files, cols))
        rows = [row for file in files for row in _read_json(file)]
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{name!r} cannot be read: {error}. Check the file, or copy it again.") from error

    def json_batches(columns: list[str]) -> Iterator[dict[str, list]]:
        for start in range(0, len(rows), _BATCH_ROWS):
            yield {column: [row.get(column) for row in rows[start : start + _BATCH_ROWS]] for column in columns}

    return _Source(name, frozenset().union(*rows), json_batches)


def strip_dapo_wrapper(text: str) -> str:
    """Problem text without DAPO's "Answer:" instructions before and after it, and without outer blanks."""
    return text.strip().removeprefix(DAPO_PREFIX.strip()).removesuffix(DAPO_POSTFIX.strip()).strip()


def _clean_problem(value: Any) -> str:
    """Problem text of a string or of the first chat message (the reference drops the others). Raises ValueError."""
    if isinstance(value, list):
        value = value[0].get("content") if value and isinstance(value[0], dict) else None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"prompt is {type(value).__name__} and not text")
    problem = strip_dapo_wrapper(value or "")
    if not problem:
        raise ValueError("empty prompt")
    return problem


def _clean_answer(value: Any, gsm8k: bool) -> str:
    """Bare answer text. Raises ValueError with the reason, never converts a number."""
    if isinstance(value, dict):
        value = value.get("ground_truth")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"answer is {type(value).__name__} and not text")
    answer = (value or "").strip()
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


def _columns_of(source: _Source) -> tuple[str, str]:
    for problem_column, answer_column in _SCHEMAS:
        if {problem_column, answer_column} <= source.columns:
            return problem_column, answer_column
    pairs = ", ".join(f"{problem}/{answer}" for problem, answer in _SCHEMAS)
    raise DataError(
        f"{source.name!r} has columns {', '.join(sorted(source.columns)) or '(none)'}: no problem and answer there. "
        f"Rename two columns to one of these pairs: {pairs}."
    )


def _is_gsm8k(source: _Source, columns: tuple[str, str]) -> bool:
    """Whether answers are worked solutions that end in `#### N`; other question/answer sets hold the bare answer."""
    if columns != ("question", "answer"):
        return False
    answers = (value for batch in source.batches(["answer"]) for value in batch["answer"] if isinstance(value, str))
    return any(_GSM8K_MARK in value or "\n" in value.strip() for value in answers)


def load_problems(name: str, config: str | None = None, split: str = "train", revision: str | None = None) -> Dataset:
    """Read a dataset and check every row.

    Args:
        name: a Hub dataset, a .parquet/.jsonl/.json file, or a folder with `<split>.parquet` (or .jsonl, .json).
        config, revision: of the Hub dataset; not allowed with a local path.
        split: split of the Hub dataset or of the folder; a single file is read whole.

    Returns:
        Dataset with `problem` (str), `solution` (str, the bare answer) and `row` (int, row in the source, from 0).

    Raises:
        DataError: unknown or unreadable source, unknown columns, or bad rows (the first 10 and the count are named).
    """
    path = Path(name).expanduser()
    if path.exists() or path.suffix in _FILE_TYPES or str(name).startswith(("/", ".", "~")):
        if config or revision:
            raise DataError(
                f"{str(name)!r} is a local path, so config={config!r} and revision={revision!r} have no meaning: "
                "remove them, or give the name of a Hub dataset."
            )
        source = _open_local(path, split)
    else:
        source = _open_hub(name, config, split, revision)
    columns = _columns_of(source)
    try:
        table = _check_rows(source, columns, _is_gsm8k(source, columns))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{source.name!r} cannot be read: {error}. Check the file, or copy it again.") from error
    if not table.num_rows:
        raise DataError(f"{source.name!r} has no rows: there is nothing to train on. Check the split and the file.")
    return Dataset(table, info=DatasetInfo(dataset_name=source.name))


def _check_rows(source: _Source, columns: tuple[str, str], gsm8k: bool) -> pa.Table:
    """All rows cleaned, [rows] of `problem`, `solution`, `row`; or a DataError that names every kind of bad row."""
    batches, bad, row = [], {}, 0
    for batch in source.batches(list(columns)):
        problems, solutions, start = [], [], row
        for problem, answer in zip(batch[columns[0]], batch[columns[1]], strict=True):
            try:
                problems.append(_clean_problem(problem))
                solutions.append(_clean_answer(answer, gsm8k))
            except ValueError as reason:
                bad.setdefault(str(reason), []).append(row)
            row += 1
        if not bad:
            arrays = [pa.array(problems, pa.string()), pa.array(solutions, pa.string()), pa.array(range(start, row))]
            batches.append(pa.RecordBatch.from_arrays(arrays, schema=_PROBLEM_TABLE))
    if bad:
        kinds = []
        for reason, rows in bad.items():
            shown = ", ".join(map(str, rows[:_SHOWN_ROWS])) + ", ..." * (len(rows) > _SHOWN_ROWS)
            kinds.append(f"{reason} in {len(rows):,} row{'s' * (len(rows) > 1)} ({shown})")
        raise DataError(
            f"{source.name!r} has rows that cannot be used: {'; '.join(kinds)}; of {row:,} rows, counted from 0. The "
            "reward compares text exactly: fix or remove these rows, and store answers as text ('5', not 5)."
        )
    return pa.Table.from_batches(batches, schema=_PROBLEM_TABLE)


def _batches(dataset: Dataset, *columns: str) -> Iterator[dict[str, list]]:
    """`columns` of a dataset in batches; a DataError when one is missing."""
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise DataError(
            f"{dataset.info.dataset_name or 'the dataset'!r} has no column {', '.join(missing)} (it has "
            f"{', '.join(dataset.column_names)}). Load it with `load_problems`."
        )
    return dataset.select_columns(list(columns)).iter(_BATCH_ROWS)


def prepare_problems(dataset: Dataset) -> tuple[Dataset, DataReport]:
    """Keep the first row of each distinct problem text, and report repeats and repeats that disagree on the answer.

    Args:
        dataset: what `load_problems` returned; a repeat is a row whose problem is equal after stripping outer blanks.
    """
    first: dict[str, tuple[str, int]] = {}  # problem -> (solution, row) of its first occurrence
    conflicts: dict[int, int] = {}  # row of the first occurrence -> first row with another answer
    rows = 0
    for batch in _batches(dataset, "problem", "solution", "row"):
        rows += len(batch["row"])
        for problem, solution, row in zip(batch["problem"], batch["solution"], batch["row"], strict=True):
            kept_solution, kept_row = first.setdefault(problem.strip(), (solution, row))
            if solution != kept_solution:
                conflicts.setdefault(kept_row, row)
    columns = {
        "problem": list(first),
        "solution": [solution for solution, _ in first.values()],
        "row": [row for _, row in first.values()],
    }
    report = DataReport(rows=rows, kept=len(first), duplicates=rows - len(first), conflicts=tuple(conflicts.items()))
    return Dataset(pa.table(columns, schema=_PROBLEM_TABLE), info=dataset.info), report


def split_heldout(dataset: Dataset, size: int, seed: int) -> tuple[Dataset, Dataset]:
    """Draw `size` distinct problems for evaluation; training keeps every row of the other problems, in order.

    No problem is on both sides, even when `dataset` still holds repeats. Same arguments, same split.

    Raises:
        DataError: when `size` is negative or leaves no problem to train on.
    """
    first: dict[str, int] = {}
    texts = [problem for batch in _batches(dataset, "problem") for problem in batch["problem"]]
    for index, text in enumerate(texts):
        first.setdefault(text, index)
    if not 0 <= size < len(first):
        raise DataError(
            f"cannot hold out {size:,} of {len(first):,} distinct problems: at least one must stay for training. "
            "Lower the held-out size or give more data."
        )
    heldout = set(random.Random(seed).sample(list(first), size))
    train_rows = [index for index, text in enumerate(texts) if text not in heldout]
    return dataset.select(train_rows), dataset.select(sorted(first[text] for text in heldout))


def format_prompt(problem: str, suffix: str = BOXED_SUFFIX) -> list[dict[str, str]]:
    """One user message, without system prompt: the problem and `suffix` (`EVAL_BOXED_SUFFIX` in evaluation)."""
    return [{"role": "user", "content": problem + suffix}]


def _templated_length(tokenizer: "PreTrainedTokenizerBase", messages: list[dict], kwargs: dict) -> int:
    """Prompt length in tokens after the chat template, with the generation prompt."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, **kwargs)
    return len(ids["input_ids"] if hasattr(ids, "keys") else ids)  # transformers 5 returns a BatchEncoding by default


def to_training_dataset(
    dataset: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_length: int,
    chat_template_kwargs: dict[str, Any] | None = None,
    report: DataReport | None = None,
) -> tuple[Dataset, DataReport]:
    """Format every problem as a chat prompt and drop those over `max_prompt_length` tokens once templated.

    Args:
        dataset: what `load_problems`, `prepare_problems` or `split_heldout` returned.
        tokenizer: the model's own, with a chat template.
        max_prompt_length: tokens, the template's own included (JustRL: 1,024).
        chat_template_kwargs: passed to the template, e.g. `{"enable_thinking": True}`.
        report: of `prepare_problems`, to be completed; None starts a new one.

    Returns:
        Dataset with `prompt` (list of one {role, content}), `solution` and `row`; and the completed report.

    Raises:
        DataError: when the tokenizer has no chat template or no prompt is short enough.
    """
    if getattr(tokenizer, "chat_template", "") is None:
        raise DataError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template to format prompts with: "
            "use an instruction-tuned model, or set `tokenizer.chat_template`."
        )
    lengths: dict[str, int] = {}  # tokens per distinct problem: repeats are measured once
    batches = []
    for batch in _batches(dataset, "problem", "solution", "row"):
        kept: list[tuple] = []
        for problem, solution, row in zip(batch["problem"], batch["solution"], batch["row"], strict=True):
            messages = format_prompt(problem)
            if problem not in lengths:
                lengths[problem] = _templated_length(tokenizer, messages, chat_template_kwargs or {})
            if lengths[problem] <= max_prompt_length:
                kept.append((messages, solution, row))
        arrays = [pa.array([item[i] for item in kept], field.type) for i, field in enumerate(_TRAINING_TABLE)]
        batches.append(pa.RecordBatch.from_arrays(arrays, schema=_TRAINING_TABLE))
    table = pa.Table.from_batches(batches, schema=_TRAINING_TABLE)
    if not table.num_rows:
        raise DataError(
            f"all {len(dataset):,} prompts are longer than max_prompt_length={max_prompt_length:,} tokens (shortest "
            f"{min(lengths.values(), default=0):,}, longest {max(lengths.values(), default=0):,}): nothing is left. "
            "Raise the limit; prompt and completion together must fit the model's context."
        )
    report = replace(
        report or DataReport(rows=len(dataset), kept=len(dataset)),
        kept=table.num_rows,
        overlong=len(dataset) - table.num_rows,
        max_prompt_length=max_prompt_length,
    )
    return Dataset(table, info=DatasetInfo(dataset_name=dataset.info.dataset_name)), report
