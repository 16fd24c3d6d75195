"""What only a GPU can show. Without one these tests are skipped, with one a skip is a failure.

`pytest tests/gpu --rehearse` runs the same code on a CPU, small and in float32, with PyTorch's SDPA in the place of the varlen
kernel: it proves nothing about a GPU, but no GPU minute is lost to a typo.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()


def pytest_addoption(parser):
    parser.addoption("--rehearse", action="store_true", help="run the GPU tests on a CPU, small")


def pytest_collection_modifyitems(config, items):
    rehearse = config.getoption("--rehearse", default=False)
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not GPU and not rehearse:
                item.add_marker(pytest.mark.skip(reason="this machine has no GPU (--rehearse runs these on a CPU)"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A GPU test that is skipped on a GPU would look like one that passed."""
    outcome = yield
    report = outcome.get_result()
    if GPU and report.skipped and item.get_closest_marker("gpu") and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped, although there is a GPU: {report.longrepr}"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(scope="session")
def half() -> torch.dtype:
    """What the model computes in: bfloat16 on a GPU."""
    return torch.bfloat16 if GPU else torch.float32


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
