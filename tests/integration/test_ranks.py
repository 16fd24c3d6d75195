"""Two ranks compute what one does: stock TRL's gradients, under DDP and ZeRO-3, balanced, with few words between them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.side_by_side import error, run

from .conftest import NO_GPU, ON_PATH, ROOT, TWO_RANKS

pytestmark = pytest.mark.timeout(900)

DDP = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ZERO3 = ["-m", "accelerate.commands.launch", "--quiet", *TWO_RANKS]
PROGRAM = Path(__file__).parents[1] / "side_by_side.py"


def two_ranks(launcher: list[str], cases: dict[str, dict], out: Path) -> dict[str, dict]:
    """What each case saw, one after another in the same two processes."""
    done = subprocess.run(
        [sys.executable, *launcher, str(PROGRAM), str(out), json.dumps(cases)],
        cwd=ROOT,
        env={**os.environ, **ON_PATH, "OMP_NUM_THREADS": "1", **NO_GPU},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(out, weights_only=True)


WARMING_UP = {"rollout_steps": 3, "changes": {"warmup_rollout_steps": 2}}
CASES = {
    "stock": {"trainer": "stock"},
    "liger": {"trainer": "ours"},
    "trl": {"trainer": "ours", "changes": {"loss_backend": "trl"}},
    # a wave of one sequence for two ranks, one that fills both, and the rest
    "waves": {"trainer": "ours", "waves": [1, 20]},
    # one optimizer step per rollout step: the same sequences in it on any number of ranks
    "one step": {"trainer": "ours", "optimizer_steps": 1},
    # rank 1 plants it, both ranks leave the optimizer step out; it is the last one of the warm-up's second rollout step
    "nan": {"trainer": "ours", "plant_nan_at": {7: 1}, **WARMING_UP},
    "clean": {"trainer": "ours", **WARMING_UP},
}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return two_ranks(DDP, CASES, tmp_path_factory.mktemp("ddp") / "seen.pt")


MORE = {
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": True, "learning_rate": 2e-2},
    "decay": {"changes": {"weight_decay": 0.1, "max_grad_norm": 0.5}},
}


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    tied = {"tied stock": {"trainer": "stock", "tied": True}, "tied liger": {"trainer": "ours", "tied": True}}
    more = {name: {"trainer": "ours", **case} for name, case in MORE.items()}
    more["lora stock"] = {**more["lora"], "trainer": "stock"}
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


def test_responses_scored_while_others_are_sampled_train_as_if_scored_at_the_end(seen):
    """Who scores a response and who trains on it are different ranks; one rank has to repeat a sequence."""
    assert_same(seen["waves"], seen["stock"])
    assert seen["waves"]["metrics"][0]["entropy"] == pytest.approx(seen["liger"]["metrics"][0]["entropy"], rel=1e-5)


def test_a_tied_head_equals_stock_trl_under_zero3(zero3):
    assert_same(zero3["tied liger"], zero3["tied stock"])


def test_gradient_checkpointing_changes_nothing_under_zero3(zero3):
    assert_same(zero3["checkpointing"], zero3["stock"])


def test_adapters_equal_stock_trl_under_zero3(zero3):
    assert_same(zero3["lora"], zero3["lora stock"])


def test_parameters_were_sharded(zero3):
    """Small ones are kept whole on every rank unless told otherwise, and nothing would ever be gathered."""
    assert all(zero3[name]["sharded"] for name in ("stock", "liger", "trl", "tied liger", "lora"))


def test_one_rank_computes_what_two_do(seen):
    one = run("ours", optimizer_steps=1)
    assert_same(one, seen["one step"])


def test_ranks_are_balanced(seen):
    for name in ("liger", "trl"):
        assert seen[name]["metrics"][0]["load_imbalance"] < 1.1  # 16 sequences: with 512 it is 1.01


def test_a_nan_on_one_rank_is_left_out_on_both_and_the_run_goes_on(seen):
    nan, clean = seen["nan"], seen["clean"]
    assert not torch.isfinite(nan["gradients"][7]).all()
    for step in range(7):
        assert error(nan["gradients"][step], clean["gradients"][step]) < 1e-6
    assert all(torch.isfinite(gradient).all() for gradient in nan["gradients"][8:])
    assert torch.equal(nan["weights"][7], nan["weights"][6]) and not torch.equal(nan["weights"][8], nan["weights"][7])
    assert [row["skipped_optimizer_steps"] for row in nan["metrics"] if "reward" in row] == [0, 1, 0]


def test_the_schedule_does_not_lag_behind_a_skipped_optimizer_step(seen):
    # after optimizer step 1, 2, ...: k / 2 for the k finished rollout steps of four
    assert seen["nan"]["lr"] == pytest.approx([1e-3 * k / 2 for k in (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2)])
    assert seen["nan"]["lr"] == seen["clean"]["lr"]


def test_decay_and_clip_reach_the_optimizer_under_zero3(zero3):
    """One optimizer step of AdamW with weight decay 0.1 and gradient clip 0.5, by torch on the recorded gradient."""
    seen, before = zero3["decay"], zero3["stock"]["weights_before"]
    gradient = seen["gradients"][0]
    parameter = torch.nn.Parameter(before.clone())
    parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_([parameter], 0.5)
    assert norm > 0.5
    torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1).step()
    moved, expected = seen["weights"][0] - before, parameter.detach() - before
    assert error(moved, expected) < 1e-3


def test_at_most_two_collectives_of_ours_per_optimizer_step(seen):
    """Under DDP and ZeRO-3 alike; the engines' own are not counted."""
    ours, stock = seen["liger"]["collectives"], seen["stock"]["collectives"]
    assert max(ours[1:]) <= 2, ours
    assert sum(ours) < sum(stock)
