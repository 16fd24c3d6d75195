"""A part of the GPU check and its process: started with a deadline, ended with everything that it has started."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, ABSENT = "passed", "failed", "absent"
_GRACE_SECONDS = 15.0  # from SIGTERM to SIGKILL; a server's guard takes 8
_MARK = "GPU_CHECK_PART"  # in the environment of every process of a part


@dataclass(frozen=True)
class Part:
    """One row of the table.

    Attributes:
        needs: packages without which it cannot run.
        command, rehearsal: arguments of python on a GPU, and for a rehearsal on a CPU; `{out}` is the folder of the figures.
        seconds: deadline.
    """

    name: str
    needs: tuple[str, ...]
    command: tuple[str, ...]
    rehearsal: tuple[str, ...]
    seconds: int


@dataclass
class Result:
    """What came of a part; `reason`: what it lacks, or its last lines."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    figures: list[dict] = field(default_factory=list)


def environment(mark: str, figures: Path, rehearse: bool) -> dict[str, str]:
    """Ours, for a part: packages that only PYTHONPATH shows stay visible, and a rehearsal sees no GPU."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {_MARK: mark, "GPU_CHECK_FIGURES": str(figures), "PYTHONPATH": os.pathsep.join(paths)}
    return env | ({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} if rehearse else {})


def processes_of(mark: str) -> list[int]:
    """Every running process of a part, in whatever session: a launcher's ranks and a server have their own. They carry the
    mark, or, where vLLM has written its process title over the environment, share a session with one that does."""
    sessions: dict[int, int] = {}
    marked = set()
    for folder in (folder for folder in Path("/proc").iterdir() if folder.name.isdigit()):
        try:
            if (folder / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":  # it has ended
                continue
            sessions[int(folder.name)] = session = os.getsid(int(folder.name))
            if f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                marked.add(session)
        except OSError:
            continue  # gone meanwhile, or somebody else's
    return [process for process, session in sessions.items() if session in marked]


def end_all(mark: str) -> None:
    """End whatever runs of a part: the next one wants the GPU whole."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes_of(mark):
            with contextlib.suppress(ProcessLookupError):  # it ended by itself between the listing and the signal
                os.kill(process, number)
        deadline = time.monotonic() + _GRACE_SECONDS
        while processes_of(mark) and time.monotonic() < deadline:
            time.sleep(0.2)


def run(part: Part, out: Path, rehearse: bool, seconds: float) -> Result:
    """Run a part within `seconds`; its output goes to check.log, and the end of it to the terminal when it fails."""
    figures, log = out / "figures.jsonl", out / "check.log"
    figures.unlink(missing_ok=True)
    arguments = [argument.replace("{out}", str(out)) for argument in (part.rehearsal if rehearse else part.command)]
    started, mark = time.monotonic(), uuid.uuid4().hex
    with log.open("ab") as file:
        file.write(f"\n=== {part.name}: python {' '.join(arguments)}\n".encode())
        begin = file.tell()
        file.flush()
        env = environment(mark, figures, rehearse)
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
            reason = "" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            status, reason = 1, f"no end after {seconds:.0f} s"
        finally:  # after Ctrl-C too
            took = time.monotonic() - started
            end_all(mark)
            process.wait()
    lines = figures.read_text().splitlines(keepends=True) if figures.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be cut off
    figures.unlink(missing_ok=True)
    found += benchmark_figures(out / "training_step.json") if part.name == "benchmark" else []
    if status:
        tail = log.read_bytes()[begin:].decode(errors="replace").splitlines()[-25:]
        print("\n".join([f"--- {part.name} failed ({reason}); the end of its output:", *tail, "---"]), flush=True)
    return Result(part.name, FAILED if status else PASSED, took, reason, found)


def benchmark_figures(file: Path) -> list[dict]:
    """The main figures of each variant that ran, and the memory of each packed row; none of a file that was cut off."""
    try:
        result = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return []
    names, budgets = ("tokens_per_second", "mfu_training", "peak_gib"), result["memory"].get("budgets", {}).items()
    rows = [{"test": name, **{key: row[key] for key in names}} for name, row in result["variants"].items() if "runs" in row]
    rows += [{"test": f"row of {n} tokens", "peak_gib": row["peak_gib"]} for n, row in budgets if "peak_gib" in row]
    return rows
