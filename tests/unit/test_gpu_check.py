"""The GPU check survives whatever is missing or breaks, and never calls that a success."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.gpu import check
from tests.gpu.check import missing, run_all, table
from tests.gpu.part import ABSENT, FAILED, PASSED, Part, Result, benchmark_figures, environment

ROOT = Path(__file__).resolve().parents[2]
NO_CARD = {"card": None}
SLEEPS = ["sleep", "300"]
# two processes that outlive their parent: one in its group, one in a session of its own, as a launcher's ranks and servers are
FAMILY = f"""
import pathlib, subprocess, sys, time
children = [subprocess.Popen({SLEEPS}), subprocess.Popen({SLEEPS}, start_new_session=True)]
pathlib.Path(sys.argv[1]).write_text(" ".join(str(child.pid) for child in children))
"""


def part(program: str, needs: tuple[str, ...] = (), seconds: int = 30, name: str = "mine", argument: object = "") -> Part:
    return Part(name, needs, ("-c", "raise SystemExit(7)"), ("-c", program, str(argument)), seconds)


def run(tmp_path: Path, program: str, seconds: float = 30, **options) -> Result:
    return check.run(part(program, **options), tmp_path, rehearse=True, seconds=seconds)


def family(pids: Path) -> list[int]:
    """Which of `FAMILY` still run."""
    assert len(pids.read_text().split()) == 2
    running = (pid for pid in map(int, pids.read_text().split()) if psutil.pid_exists(pid))
    return [pid for pid in running if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_a_part_that_ends_well_has_passed_with_its_figures(tmp_path):
    program = 'import os; open(os.environ["GPU_CHECK_FIGURES"], "a").write(\'{"test": "test_it", "peak_gib": 1.25}\\n\')'
    got = run(tmp_path, program)
    assert got.status == PASSED and got.figures == [{"test": "test_it", "peak_gib": 1.25}]
    assert "it: peak_gib 1.25" in table([got], rehearse=False)


def test_a_part_that_is_ended_while_it_writes_keeps_its_whole_lines(tmp_path):
    program = 'import os; open(os.environ["GPU_CHECK_FIGURES"], "a").write(\'{"test": "first"}\\n{"test": "sec\'); os.abort()'
    got = run(tmp_path, program)
    assert (got.status, got.figures) == (FAILED, [{"test": "first"}])


def test_figures_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path):
    (tmp_path / "figures.jsonl").write_text('{"test": "old"}\n')
    assert run(tmp_path, "pass").figures == []


def test_the_benchmark_tells_what_ran_and_its_own_figures_stay(tmp_path):
    ran = {"tokens_per_second": 5.0, "mfu_training": 0.5, "peak_gib": 3.0}
    rows = {"ours": {"status": "ok", "runs": 1, **ran, "seconds": {}}, "other": {"status": "no GPU", "error": "no GPU"}}
    rows["once of twice"] = {"status": "failed", "error": "out of memory", "runs": 1, **ran}
    budgets = {"8192": {"peak_gib": 9.5, "seconds": 1.0}, "65536": {"error": "out of memory"}}
    written = json.dumps({"variants": rows, "memory": {"budgets": budgets}})
    program = f"import sys; open(sys.argv[1], 'w').write({written!r})"
    file = tmp_path / "training_step.json"
    parts = [part(program, name="benchmark", argument=file), part("pass", name="another")]
    benchmark, other = run_all(parts, tmp_path, NO_CARD, rehearse=True, budget=60)
    memory = {"test": "row of 8192 tokens", "peak_gib": 9.5}
    assert benchmark.figures == [{"test": "ours", **ran}, {"test": "once of twice", **ran}, memory]
    assert other.figures == [] and file.read_text() == written
    for others in (json.dumps({"variants": {}, "memory": {"error": "out of memory"}}), '{"variants": {"ours"'):
        file.write_text(others)
        assert benchmark_figures(file) == [] == benchmark_figures(tmp_path / "absent.json")


def test_a_part_that_fails_says_so_and_shows_its_end(tmp_path, capsys):
    run(tmp_path, 'print("the part before")')
    got = run(tmp_path, 'print("out of memory"); raise SystemExit(3)')
    assert got.status == FAILED and got.reason == "exit status 3"
    printed = capsys.readouterr().out
    assert "out of memory" in printed and "the part before" not in printed
    log = (tmp_path / "check.log").read_text()
    assert log.index("=== mine") < log.index("the part before") < log.index("out of memory")


@pytest.mark.parametrize("ending", ["time.sleep(300)", "pass"])
def test_all_that_a_part_started_is_ended_with_it(tmp_path, ending):
    got = run(tmp_path, FAMILY + ending, seconds=3, argument=tmp_path / "pids")
    assert (got.status, got.reason) == ((FAILED, "no end after 3 s") if "sleep" in ending else (PASSED, ""))
    assert family(tmp_path / "pids") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_check_that_is_interrupted_leaves_nothing_running(tmp_path, number):
    program = f"""
import sys
from tests.gpu import check
check.PARTS = [check.Part("mine", (), (), ("-c", {FAMILY + "time.sleep(300)"!r}, {str(tmp_path / "pids")!r}), 60)]
sys.argv = ["check.py", "--rehearse"]
sys.exit(check.main())
"""
    env = {**os.environ, "OUT": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "pids").exists() and (tmp_path / "pids").read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        assert len(family(tmp_path / "pids")) == 2
        process.send_signal(number)
        assert process.wait(40) != 0
    finally:
        process.kill()
    assert family(tmp_path / "pids") == []


def test_parts_share_the_time_and_a_part_without_any_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_LEAST_SECONDS", 0.5)
    parts = [part("import time; time.sleep(60)", name="hangs"), part("pass", name="late"), part("", ("no_such_package",))]
    hangs, late, absent = run_all(parts, tmp_path, NO_CARD, rehearse=True, budget=2)
    assert hangs.reason == "no end after 2 s" and hangs.seconds < 30
    assert late.status == FAILED and late.reason == "no time left of 2 s (--seconds)"
    assert absent.status == ABSENT


def test_packages_that_only_pythonpath_shows_are_there_in_every_part(tmp_path, monkeypatch):
    """A machine without a network has its packages unpacked somewhere."""
    (tmp_path / "unpacked").mkdir()
    (tmp_path / "unpacked" / "only_there.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "unpacked"))
    program = f"import only_there, justrl_trl; assert justrl_trl.__file__.startswith({str(ROOT / 'justrl_trl')!r})"
    assert run(tmp_path, program).status == PASSED


def test_a_rehearsal_sees_no_gpu(tmp_path):
    assert run(tmp_path, "import os; assert os.environ['CUDA_VISIBLE_DEVICES'] == ''").status == PASSED
    assert "CUDA_VISIBLE_DEVICES" not in environment("m", tmp_path, rehearse=False).keys() - os.environ.keys()


def test_missing_packages_of_a_part_are_named():
    assert missing(part("", needs=("torch", "no_such_package")), gpu=True, rehearse=False) == "not installed: no_such_package"
    assert missing(part("", needs=("torch",)), gpu=True, rehearse=False) == ""
    assert missing(part("", needs=("no_such_package",)), gpu=False, rehearse=False) == "not installed: no_such_package"
    assert missing(part(""), gpu=False, rehearse=False).startswith("no GPU")
    assert missing(part(""), gpu=False, rehearse=True) == ""


def test_the_table_has_a_row_for_each_part_and_says_what_a_rehearsal_is():
    results = [Result("loss", PASSED, 12.3), Result("server", ABSENT, reason="not installed: vllm")]
    lines = table(results, rehearse=True).splitlines()
    assert "proves nothing about a GPU" in lines[0]
    assert lines[2:] == ["loss         passed         12", "server       absent          -  not installed: vllm"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the parts are not absent")
def test_without_a_gpu_it_runs_to_its_end_and_reports_every_part_as_absent(tmp_path):
    env = {"PATH": "/usr/bin:/bin", "OUT": str(tmp_path)}
    done = subprocess.run(["bash", "tests/gpu/check.sh"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "check.json").read_text())
    assert [(row["name"], row["status"]) for row in written["parts"]] == [(part.name, ABSENT) for part in check.PARTS]
    assert done.stdout.count("absent") == len(check.PARTS) and "no GPU" in done.stdout


NVIDIA_SMI = '#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"\nexit 0\n'


@pytest.fixture
def unusable_gpu(tmp_path, monkeypatch) -> dict[str, str]:
    """An environment in which `nvidia-smi` lists a GPU that torch cannot use."""
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "OUT": str(tmp_path / "out")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU can be used")
@pytest.mark.parametrize("command", [["tests/gpu/check.py"], ["-m", "pytest", "-q", "tests/gpu/test_loss.py"]])
def test_a_gpu_that_torch_cannot_use_is_an_error_and_not_an_absence(unusable_gpu, command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=unusable_gpu, capture_output=True, text=True, check=False)
    assert done.returncode not in (0, 1), done.stdout + done.stderr
    assert "nvidia-smi lists 1 GPUs" in done.stdout + done.stderr and "absent" not in done.stdout


SKIPPING = {
    "a test": "import pytest\ndef test_it(): pytest.skip('no time')",
    "a file": "import pytest\npytest.skip('no time', allow_module_level=True)",
}


@pytest.mark.parametrize("skips", SKIPPING)
@pytest.mark.parametrize("gpu", [True, False])
def test_with_a_gpu_a_skip_is_a_failure(tmp_path, skips, gpu):
    shutil.copy(ROOT / "tests" / "gpu" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    (tmp_path / "test_it.py").write_text(SKIPPING[skips])
    (tmp_path / "pretend.py").write_text(f"import torch\ntorch.cuda.is_available = lambda: {gpu}")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pretend", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    if gpu:
        assert done.returncode != 0 and "skipped, although there is a GPU" in done.stdout and "no time" in done.stdout
    else:
        assert "1 skipped" in done.stdout and "failed" not in done.stdout and "error" not in done.stdout


def test_an_unknown_part_is_an_error(tmp_path):
    done = subprocess.run(
        [sys.executable, "tests/gpu/check.py", "--only", "loss,los"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "there is no part los" in done.stderr


def test_one_failed_part_is_the_exit_status_of_all(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["check.py", "--rehearse"])
    monkeypatch.setattr(check, "PARTS", [part("raise SystemExit(1)"), part("pass")])
    assert check.main() == 1
    assert [row["status"] for row in json.loads((tmp_path / "check.json").read_text())["parts"]] == [FAILED, PASSED]
    monkeypatch.setattr(check, "PARTS", [part("pass"), part("", needs=("no_such_package",))])
    assert check.main() == 0
