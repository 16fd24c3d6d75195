"""Problems by name: the paper's benchmarks, local files, the embedded arithmetic."""

from pathlib import Path

from justrl_trl.data.benchmarks import Problem, load, select
from justrl_trl.data.problems import load_problems
from justrl_trl.data.tiny import ARITHMETIC, arithmetic_problems
from justrl_trl.errors import DataError
from justrl_trl.evaluation.sampling import Task

OWN_SAMPLES = 4  # N for problems that are not the paper's
_FILES = (".parquet", ".jsonl", ".json")


def find_tasks(
    benchmarks: str, *, data_dir: str | None = None, samples: int | None = None, limit: int | None = None
) -> list[Task]:
    """Every benchmark that is named, with its problems; those with the most samples first: competitions, the longest responses.

    Args:
        benchmarks: comma list, see `EvaluateArguments.benchmarks`.
        data_dir: folder of local files; None: the Hub.
        samples: responses per problem; None: the paper's number, `OWN_SAMPLES` for others.
        limit: problems of each at most.

    Raises:
        DataError: an unknown benchmark, one that is named twice, or one whose data cannot be used.
    """
    names = [name.strip() for name in benchmarks.split(",") if name.strip()]
    own = [name for name in names if name == ARITHMETIC or Path(name).suffix in _FILES or Path(name).expanduser().exists()]
    known = [name for name in names if name not in own]
    tasks = []
    for name in own:
        rows = arithmetic_problems("heldout") if name == ARITHMETIC else load_problems(name, split="test")
        pairs = [(row["problem"], row["solution"]) for row in rows][:limit]
        stem = "arithmetic" if name == ARITHMETIC else Path(name).stem
        tasks.append(Task(stem, stem, [Problem(i, *pair) for i, pair in enumerate(pairs)], samples or OWN_SAMPLES))
    for benchmark in select(known) if known or not own else ():
        problems = load(benchmark, data_dir)[:limit]
        tasks.append(Task(benchmark.name, benchmark.title, problems, samples or benchmark.samples))
    twice = {task.name for i, task in enumerate(tasks) if task.name in [other.name for other in tasks[:i]]}
    if twice:
        raise DataError(f"{benchmarks}: two of these benchmarks are called {', '.join(twice)}. Rename a file.")
    return sorted(tasks, key=lambda task: -task.samples)
