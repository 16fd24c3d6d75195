"""The GPU check survives whatever is missing or breaks, and never calls that a success."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import check
from tests.gpu.check import ABSENT, FAILED, PASSED, Part, Result, missing, table

ROOT = Path(__file__).resolve().parents[2]


def part(program: str, needs: tuple[str, ...] = (), seconds: int = 30) -> Part:
    return Part("mine", needs, ("-c", "raise SystemExit(7)"), ("-c", program), seconds)


def run(tmp_path: Path, program: str, **options) -> Result:
    return check.run(part(program, **options), tmp_path, rehearse=True)


def test_a_part_that_ends_well_has_passed_with_its_figures(tmp_path):
    program = 'import os; open(os.environ["GPU_CHECK_FIGURES"], "a").write(\'{"test": "test_it", "peak_gib": 1.25}\\n\')'
    got = run(tmp_path, program)
    assert got.status == PASSED and got.figures == [{"test": "test_it", "peak_gib": 1.25}]
    assert "it: peak_gib 1.25" in table([got], rehearse=False)


def test_figures_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"test": "old"}\n')
    assert run(tmp_path, "pass").figures == []


def test_the_benchmark_tells_what_ran(tmp_path):
    rows = {"ours": {"status": "ok", "tokens_per_second": 5.0, "mfu_training": 0.5, "peak_gib": 3.0, "seconds": {}}}
    (tmp_path / "b.json").write_text(json.dumps({"variants": rows | {"other": {"status": "no GPU", "error": "no GPU"}}}))
    assert check.benchmark_figures(tmp_path / "b.json") == [
        {"test": "ours", "tokens_per_second": 5.0, "mfu_training": 0.5, "peak_gib": 3.0}
    ]
    assert check.benchmark_figures(tmp_path / "absent.json") == []


def test_a_part_that_fails_says_so_and_shows_its_end(tmp_path, capsys):
    got = run(tmp_path, 'print("out of memory"); raise SystemExit(3)')
    assert got.status == FAILED and got.reason == "exit status 3"
    assert "out of memory" in capsys.readouterr().out


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    got = run(tmp_path, "import subprocess; subprocess.run(['sleep', '60'])", seconds=1)
    assert got.status == FAILED and got.reason == "no end after 1 s" and got.seconds < 20


def test_what_a_part_lacks_is_named():
    assert missing(part("", needs=("torch", "no_such_package")), gpu=True, rehearse=False) == "not installed: no_such_package"
    assert missing(part("", needs=("torch",)), gpu=True, rehearse=False) == ""
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
