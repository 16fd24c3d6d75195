"""What only a GPU can show. Without one these tests are skipped, with one a skip is a failure.

`pytest tests/gpu --rehearse` runs the same code on a CPU, small, with PyTorch's SDPA in the place of the varlen kernel and
float32 in training: it proves nothing about a GPU, but no GPU minute is lost to a typo.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from justrl_trl.preflight.gpu_driver import check_gpu_driver

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.cuda.is_available()


def pytest_addoption(parser):
    parser.addoption("--rehearse", action="store_true", help="run the GPU tests on a CPU, small")


def pytest_collection_modifyitems(config, items):
    rehearse = config.getoption("--rehearse", default=False)
    mine = [item for item in items if Path(__file__).parent in item.path.parents]
    if mine and not GPU and not rehearse:
        try:
            check_gpu_driver()
        except ValueError as error:  # a GPU that torch cannot use is not "no GPU"
            raise pytest.UsageError(str(error)) from error
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if not GPU and not rehearse:
            item.add_marker(pytest.mark.skip(reason="this machine has no GPU (--rehearse runs these on a CPU)"))


def _fail_if_skipped(report) -> None:
    """A GPU test that is skipped on a GPU would look like one that passed."""
    if GPU and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped, although there is a GPU: {report.longrepr}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    _fail_if_skipped((yield).get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    """A whole file."""
    _fail_if_skipped((yield).get_result())


def child_environment(gpu: bool = GPU) -> dict[str, str]:
    """For programs that a test starts: this checkout first, other packages where they were; without a GPU, none is seen."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "4" if GPU else "1", **hidden}


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def figures(request) -> Callable[..., None]:
    """`figures(peak_gib=3.1)`: a line for the table of `check.py`, where that has asked for them."""

    def record(**values: object) -> None:
        print(f"{request.node.name}: {values}")
        if out := os.environ.get("GPU_CHECK_FIGURES"):
            with open(out, "a") as file:
                file.write(json.dumps({"test": request.node.name, **values}) + "\n")

    return record


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative L2 distance, in float64 on the CPU."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).norm() / other.norm())
