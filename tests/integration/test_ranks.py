"""Two ranks compute what one does: stock TRL's gradients, under DDP and ZeRO-3, balanced, with few words between them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.side_by_side import error, run

from .conftest import ROOT, TWO_RANKS

pytestmark = pytest.mark.timeout(900)

DDP = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ZERO3 = ["-m", "accelerate.commands.launch", "--quiet", *TWO_RANKS]
PROGRAM = Path(__file__).parents[1] / "side_by_side.py"


def two_ranks(launcher: list[str], cases: dict[str, dict], out: Path) -> dict[str, dict]:
    """What each case saw, one after another in the same two processes."""
    done = subprocess.run(
        [sys.executable, *launcher, str(PROGRAM), str(out), json.dumps(cases)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(out, weights_only=True)


CASES = {
    "stock": {"trainer": "stock"},
    "liger": {"trainer": "ours"},
    "trl": {"trainer": "ours", "changes": {"loss_backend": "trl"}},
    # one optimizer step per rollout step: the same sequences in it on any number of ranks
    "one step": {"trainer": "ours", "optimizer_steps": 1},
    # rank 1 plants it, both ranks leave the optimizer step out
    "nan": {"trainer": "ours", "plant_nan_at": {2: 1}},
}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return two_ranks(DDP, CASES, tmp_path_factory.mktemp("ddp") / "seen.pt")


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    tied = {"tied stock": {"trainer": "stock", "tied": True}, "tied liger": {"trainer": "ours", "tied": True}}
    more = {"checkpointing": {"trainer": "ours", "gradient_checkpointing": True}, "lora": {"trainer": "ours", "lora": True}}
    return two_ranks(ZERO3, CASES | tied | more, tmp_path_factory.mktemp("zero3") / "seen.pt")


@pytest.fixture(params=["ddp", "zero3"])
def seen(request):
    return request.getfixturevalue(request.param)


def assert_same(ours: dict, other: dict, later: float = 1e-4) -> None:
    errors = [error(a, b) for a, b in zip(ours["gradients"], other["gradients"], strict=True)]
    assert errors[0] <= 1e-5 and max(errors[1:], default=0) <= later, errors


@pytest.mark.parametrize("backend", ["liger", "trl"])
def test_gradients_equal_those_of_stock_trl(seen, backend):
    assert len(seen[backend]["gradients"]) == 4
    assert_same(seen[backend], seen["stock"])


def test_a_tied_head_equals_stock_trl_under_zero3(zero3):
    assert_same(zero3["tied liger"], zero3["tied stock"])


def test_gradient_checkpointing_changes_nothing_under_zero3(zero3):
    assert_same(zero3["checkpointing"], zero3["stock"])


def test_adapters_train_under_zero3_as_on_one_rank(zero3):
    assert len(zero3["lora"]["gradients"]) == 4 and all(g.norm() > 0 for g in zero3["lora"]["gradients"])


def test_one_rank_computes_what_two_do(seen):
    one = run("ours", optimizer_steps=1)
    assert_same(one, seen["one step"])


def test_ranks_are_balanced(seen):
    for name in ("liger", "trl"):
        assert seen[name]["metrics"][0]["load_imbalance"] < 1.1  # 16 sequences: with 512 it is 1.01


def test_a_nan_on_one_rank_is_left_out_on_both_and_the_run_goes_on(seen):
    nan, clean = seen["nan"], seen["liger"]
    assert not torch.isfinite(nan["gradients"][2]).all()
    for step in (0, 1):
        assert error(nan["gradients"][step], clean["gradients"][step]) < 1e-6
    assert torch.isfinite(nan["gradients"][3]).all()
    assert torch.equal(nan["weights"][2], nan["weights"][1]) and not torch.equal(nan["weights"][3], nan["weights"][2])
    assert nan["metrics"][0]["skipped_optimizer_steps"] == 1
    assert nan["lr"] == clean["lr"]


def test_at_most_two_collectives_of_ours_per_optimizer_step(seen):
    """Under DDP and ZeRO-3 alike; the engines' own are not counted."""
    ours, stock = seen["liger"]["collectives"], seen["stock"]["collectives"]
    assert max(ours[1:]) <= 2, ours
    assert sum(ours) < sum(stock)
