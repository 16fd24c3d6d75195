"""Turn rows of any dataset into checked, deduplicated, templated prompts.

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

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset, DatasetInfo

from justrl_trl.data.sources import Source, answer_text, is_gsm8k, open_source, problem_columns, problem_text
from justrl_trl.errors import DataError

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

_BATCH_ROWS = 10_000  # rows held as Python objects at a time; 1.79M DAPO rows at once would take several GB
_SHOWN_ROWS = 10
_PROBLEM_TABLE = pa.schema([("problem", pa.string()), ("solution", pa.string()), ("row", pa.int64())])
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_TRAINING_TABLE = pa.schema([("prompt", _MESSAGES), ("solution", pa.string()), ("row", pa.int64())])


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


def strip_dapo_wrapper(text: str) -> str:
    """Problem text without DAPO's "Answer:" instructions before and after it, and without outer blanks."""
    return text.strip().removeprefix(DAPO_PREFIX.strip()).removesuffix(DAPO_POSTFIX.strip()).strip()


def _clean_problem(cell: Any) -> str:
    """Problem text of a cell, bare. Raises ValueError with the reason."""
    problem = strip_dapo_wrapper(problem_text(cell))
    if not problem:
        raise ValueError("empty prompt")
    return problem


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
    source = open_source(name, config, split, revision)
    columns = problem_columns(source)
    try:
        table = _check_rows(source, columns, is_gsm8k(source, columns, _BATCH_ROWS))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{source.name!r} cannot be read: {error}. Check the file, or copy it again.") from error
    if not table.num_rows:
        raise DataError(f"{source.name!r} has no rows: there is nothing to train on. Check the split and the file.")
    return Dataset(table, info=DatasetInfo(dataset_name=source.name))


def _check_rows(source: Source, columns: tuple[str, str], gsm8k: bool) -> pa.Table:
    """All rows cleaned, [rows] of `problem`, `solution`, `row`; or a DataError that names every kind of bad row."""
    batches, bad, row = [], {}, 0
    for batch in source.batches(list(columns), _BATCH_ROWS):
        problems, solutions, start = [], [], row
        for problem, answer in zip(batch[columns[0]], batch[columns[1]], strict=True):
            try:
                problems.append(_clean_problem(problem))
                solutions.append(answer_text(answer, gsm8k))
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
