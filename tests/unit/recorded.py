"""Rows recorded by running the reference's own `core_algos.py` and actor update, for the tests of advantage, loss and metrics.

`vectors/grpo_core.jsonl` is committed and always read: one row for each kind and tag, except where advantages are not divided
by the deviation (a mode that this package lacks) and the largest mini-batches. To keep it small, advantages that are constant
over a response are written once per row, float64 numbers have 10 digits and outputs 9, far below the tolerances here. The
larger set is read when it lies beside the checkout.
"""

import json
from pathlib import Path

import pytest
import torch

_FOLDERS = {
    "committed": Path(__file__).parent / "vectors",
    "recorded": Path(__file__).resolve().parents[3] / "shared" / "vectors",
}
both_sets = pytest.mark.parametrize("which", _FOLDERS)

# relative tolerance by dtype: the reference computed in it, in another order of operations
RTOL = {"float32": 1e-5, "float64": 1e-8}
ATOL = {"float32": 1e-6, "float64": 1e-8}


def core_rows(which: str, kind: str) -> list[dict]:
    """Rows of one kind, at least one; skips the test when the larger set is not there."""
    path = _FOLDERS[which] / "grpo_core.jsonl"
    if not path.exists():
        pytest.skip(f"the full recorded set {path.name} does not lie beside this checkout")
    rows = [row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if row["kind"] == kind]
    assert rows, f"{path} has no {kind} row"
    return rows


def tensor(values, row: dict) -> torch.Tensor:
    """Recorded numbers in the dtype they were computed in."""
    return torch.tensor(values, dtype=getattr(torch, row["inputs"]["dtype"]))


def differs(got: torch.Tensor, expected, row: dict, atol: float | None = None) -> bool:
    """Whether a result is not the recorded one, within the tolerance of its dtype."""
    dtype = row["inputs"]["dtype"]
    return not torch.allclose(got, tensor(expected, row), rtol=RTOL[dtype], atol=ATOL[dtype] if atol is None else atol)
