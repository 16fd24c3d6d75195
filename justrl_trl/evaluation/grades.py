"""Grade stored responses, ask the verifier about those that the grader rejects.

Every run grades all responses again, a chunk in memory at a time. Whatever changed about the grader is thus in the result, and
the folder's `grades.jsonl` has this run's grade of each response. Verdicts of a verifier are kept, and asked for again
only when the verifier, its protocol or the gold answer is another one.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from justrl_trl.data.benchmarks import Problem
from justrl_trl.evaluation.sampling import Task
from justrl_trl.evaluation.store import Key, SampleStore
from justrl_trl.evaluation.verifier import Case, Judgement, Verifier
from justrl_trl.grading.normal_forms import mathd_form
from justrl_trl.grading.pool import GradingPool, Verdict
from justrl_trl.grading.rule import boxed_answer

_CHUNK = 1024  # responses in memory at a time


@dataclass(slots=True)
class Grade:
    """What is known of one response without its text."""

    key: Key
    tokens: int
    truncated: bool
    boxed: bool  # whether "boxed" appears at all
    answer: str | None  # its `vote`
    rule: bool  # verdict of the grader
    outcome: str  # of the grading: "graded", else why it was not and counts as wrong
    verdict: str | None = None  # output of the verifier, where it was asked

    @property
    def correct(self) -> bool:
        return self.rule or (self.verdict or "").strip() == "A"


def grade_all(
    store: SampleStore, tasks: list[Task], grader: str, workers: int | None, on_graded: Callable[[int], None]
) -> tuple[list[Grade], dict[str, int]]:
    """Grades of all samples of these tasks, in the order of the store; and the pool's counters.

    Args:
        grader: a `Grader`.
        workers: processes; None: as many as this process may use cores.
        on_graded: called with 1 after each response.
    """
    grades: list[Grade] = []
    with GradingPool(workers=workers or len(os.sched_getaffinity(0))) as pool:
        for chunk in _chunks(store, tasks):
            items = [(row["completion"], _problem(tasks, key).answer) for key, row in chunk]
            verdicts = pool.grade(items, grader, lambda index, verdict: on_graded(1))
            grades += [
                grade_of(key, row["completion"], row["tokens"], row["finish_reason"] == "length", verdict)
                for (key, row), verdict in zip(chunk, verdicts, strict=True)
            ]
        return grades, pool.counts()


def verify_all(
    store: SampleStore, tasks: list[Task], grades: list[Grade], verifier: Verifier, on_verdict: Callable[[int], None]
) -> None:
    """Ask the verifier about every response that the grader rejected and about which it has not been asked; fills in `verdict`.

    Args:
        on_verdict: called with the number of verdicts that are new: the known ones at once, then one by one.

    Raises:
        VerifierError: the server cannot be used; verdicts so far are stored.
    """
    rejected = {grade.key: grade for grade in grades if not grade.rule}
    asked = {"verifier": verifier.model, "protocol": verifier.protocol}
    for row in store.verdicts:
        grade = rejected.get((row["benchmark"], row["problem"], row["sample"]))
        if grade and _same(row, {**asked, "gold": _problem(tasks, grade.key).answer}):
            grade.verdict = row["output"]
    missing = {key for key, grade in rejected.items() if grade.verdict is None}
    on_verdict(len(rejected) - len(missing))

    def cases() -> Iterator[tuple[Key, Case]]:
        for key, row in store.rows() if missing else ():
            if key in missing:
                problem = _problem(tasks, key)
                yield key, Case(problem.problem, problem.answer, row["completion"])

    def keep(key: Key, verdict: Judgement) -> None:
        name, problem, sample = key
        fields = {**asdict(verdict), **asked, "gold": _problem(tasks, key).answer}
        store.verdicts.append({"benchmark": name, "problem": problem, "sample": sample, **fields})
        rejected[key].verdict = verdict.output
        on_verdict(1)

    verifier.judge(cases(), keep)


def _chunks(store: SampleStore, tasks: list[Task]) -> Iterator[list[tuple[Key, dict[str, Any]]]]:
    """The samples that these tasks ask for; the store may have more, of other benchmarks or of a larger N."""
    chunk = []
    sizes = {task.name: (len(task.problems), task.samples) for task in tasks}
    for key, row in store.rows():
        problems, samples = sizes.get(key[0], (0, 0))
        if key[1] < problems and key[2] < samples:
            chunk.append((key, row))
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def vote(response: str) -> str | None:
    """What a response votes for in maj@k: its last box in the MATH normal form; None without one."""
    box = boxed_answer(response)
    return None if box is None else mathd_form(box)


def grade_of(key: Key, text: str, tokens: int, truncated: bool, verdict: Verdict) -> Grade:
    """What is known of one response after the grader.

    Args:
        key: benchmark, problem, sample.
        text: decoded response of `tokens` tokens.
        truncated: the length limit ended it.
        verdict: of the grader.
    """
    return Grade(
        key=key,
        tokens=tokens,
        truncated=truncated,
        boxed="boxed" in text,
        answer=vote(text),
        rule=verdict.correct,
        outcome=verdict.outcome,
    )


def _problem(tasks: list[Task], key: Key) -> Problem:
    return next(task for task in tasks if task.name == key[0]).problems[key[1]]


def _same(row: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in expected.items())
