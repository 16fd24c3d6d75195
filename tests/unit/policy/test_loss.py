"""The objective is the reference's, values and gradients; its two averages are what they say, however a step is cut."""

import pytest
import torch

from justrl_trl.policy.loss import normalize, policy_loss
from tests.unit.recorded import both_sets, core_rows, differs, tensor

CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28, "delta": 10.0}


def recorded_policy_loss(block: dict, row: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of each token, the mask, and the log-probabilities that gradients go to."""
    inputs = row["inputs"]
    logps = tensor(block["log_prob"], row).requires_grad_()
    mask = tensor(block["response_mask"], row)
    per_token = policy_loss(
        logps,
        tensor(block["old_log_prob"], row),
        tensor(block["advantages"], row),
        mask,
        inputs["cliprange_low"],
        inputs["cliprange_high"],
        inputs["clip_ratio_c"],
    )
    return per_token, mask, logps


@both_sets
def test_policy_loss_and_its_gradient_equal_the_reference_on_every_recorded_row(which):
    disagreements = []
    rows = core_rows(which, "policy_loss")
    for row in rows:
        per_token, mask, logps = recorded_policy_loss(row["inputs"], row)
        if row["inputs"]["loss_agg_mode"] == "seq-mean-token-mean":
            loss = ((per_token * mask).sum(-1) / mask.sum(-1)).mean()
        else:
            count = len(mask)
            loss = normalize(
                per_token,
                mask,
                "reference",
                sequences_in_micro_batch=count,
                sequences_in_step=count,
                tokens_in_step=mask.sum(),
            )
        loss.backward()
        if differs(loss, row["outputs"]["pg_loss"], row):
            disagreements.append((row["id"], row["tag"], "loss"))
        # on a clip edge the two branches are equal and the gradient is whichever one was taken
        if not row["grad_at_boundary"] and differs(logps.grad, row["outputs"]["grad_log_prob"], row):
            disagreements.append((row["id"], row["tag"], "gradient"))
    assert not disagreements, f"of {len(rows)} rows: {disagreements}"


@both_sets
def test_token_mean_of_one_micro_batch_equals_the_reference_on_every_recorded_row(which):
    compared = 0
    for row in core_rows(which, "agg_loss"):
        if row["inputs"]["loss_agg_mode"] != "token-mean":
            continue
        compared += 1
        losses, mask = tensor(row["inputs"]["loss_mat"], row), tensor(row["inputs"]["loss_mask"], row)
        sizes = {"sequences_in_micro_batch": len(mask), "sequences_in_step": len(mask), "tokens_in_step": mask.sum()}
        for mode in ("reference", "token_mean"):
            got = normalize(losses, mask, mode, **sizes)
            assert not differs(got, float(row["outputs"]["loss"]), row), (row["id"], row["tag"], mode)
    assert compared


@both_sets
def test_reference_mode_sums_to_the_loss_and_gradient_of_the_recorded_optimizer_step(which):
    disagreements = []
    rows = core_rows(which, "mini_batch_loss")
    for row in rows:
        ranks = row["inputs"]["ranks"]
        sequences = row["inputs"]["ppo_mini_batch_size_per_rank"] * len(ranks)
        total, gradients = 0.0, []
        for rank, micro_batches in enumerate(ranks):
            for number, block in enumerate(micro_batches):
                per_token, mask, logps = recorded_policy_loss(block, row)
                total = total + normalize(
                    per_token,
                    mask,
                    "reference",
                    sequences_in_micro_batch=len(mask),
                    sequences_in_step=sequences,
                    tokens_in_step=float("nan"),  # this mode must not look at it
                )
                gradients.append((logps, row["outputs"]["grad_log_prob"][rank][number]))
        total.backward()
        if differs(total, row["outputs"]["loss"], row):
            disagreements.append((row["id"], row["tag"], "loss"))
        if any(differs(logps.grad, expected, row) for logps, expected in gradients):
            disagreements.append((row["id"], row["tag"], "gradient"))
    assert not disagreements, f"of {len(rows)} rows: {disagreements}"


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # d loss / d logp = -A r where the ratio itself counts, 0 where a clip does
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.56, 0.0),  # 1.28 x 2
        (0.5, 2.0, -1.0, -1.0),  # a good token that became rare is pulled back without limit
        (0.9, -2.0, 1.8, 1.8),
        (0.5, -2.0, 1.6, 0.0),  # 0.8 x 2
        (5.0, -2.0, 10.0, 10.0),  # a bad token that became likely is pushed down ...
        (20.0, -2.0, 20.0, 0.0),  # ... up to delta: 10 x 2
        (20.0, 2.0, -2.56, 0.0),  # delta says nothing about good tokens
        (3.0, 0.0, 0.0, 0.0),
    ],
)
def test_every_branch_of_the_clip_by_hand(ratio, advantage, loss, slope):
    logps = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    old, advantages, mask = torch.zeros_like(logps), torch.tensor([advantage], dtype=torch.float64), torch.ones(1)
    got = policy_loss(logps, old, advantages, mask, **CLIP)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, abs=1e-12)
    assert logps.grad.item() == pytest.approx(slope, abs=1e-12)


def random_step(seed: int, rows: int = 64, width: int = 32) -> tuple[torch.Tensor, ...]:
    """Log-probabilities whose ratios reach every branch (0.01 to 100), advantages per row, a ragged mask; float64."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, width, generator=generator, dtype=torch.float64)
    logps = old + 2 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).to(torch.float64)
    return logps, old, advantages, mask


def trl_loss(logps, old, advantages, epsilon_low, epsilon_high, delta) -> torch.Tensor:
    """The formula of TRL's `GRPOTrainer._compute_loss` with `delta`, written out again."""
    ratio = torch.exp(logps - old)
    clipped = torch.clamp(ratio, 1 - epsilon_low, 1 + epsilon_high)
    ratio = torch.clamp(ratio, max=delta)
    return -torch.min(ratio * advantages[:, None], clipped * advantages[:, None])


@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_equal_trl_with_delta_off_the_clip_edges(seed):
    logps, old, advantages, mask = random_step(seed)
    ours, theirs = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    loss = policy_loss(ours, old, advantages, torch.ones_like(mask), **CLIP)
    other = trl_loss(theirs, old, advantages, **CLIP)
    loss.sum().backward()
    other.sum().backward()
    assert torch.allclose(loss, other, rtol=1e-12)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-12)  # random ratios never lie on an edge
    ratio, negative = (logps - old).exp(), (advantages < 0)[:, None]
    for branch in (ratio < 0.8, ratio > 1.28, (ratio > 10) & negative, (ratio > 10) & ~negative):
        assert branch.any(), "the random ratios must reach every branch"


def test_padding_costs_nothing_and_gets_no_gradient():
    logps, old, advantages, mask = random_step(7)
    logps.requires_grad_()
    loss = policy_loss(logps, old, advantages, mask, **CLIP)
    loss.sum().backward()
    assert loss[mask == 0].abs().max() == 0 and logps.grad[mask == 0].abs().max() == 0
    assert loss[mask == 1].abs().min() > 0


def test_one_advantage_per_row_equals_one_per_token():
    logps, old, advantages, mask = random_step(8)
    per_row = policy_loss(logps, old, advantages, mask, **CLIP)
    assert torch.equal(per_row, policy_loss(logps, old, advantages[:, None].expand_as(mask), mask, **CLIP))
    kept = mask.bool()  # the packed form: (N,) response tokens
    per_token = advantages.repeat_interleave(kept.sum(1))
    packed = policy_loss(logps[kept], old[kept], per_token, torch.ones_like(per_token), **CLIP)
    assert torch.equal(packed, per_row[kept])


def cut(rows: int, seed: int) -> list[list[int]]:
    """`rows` indices cut into between 1 and `rows` micro-batches at random places."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator).tolist()
    pieces = int(torch.randint(1, rows + 1, (1,), generator=generator))
    places = sorted((torch.randperm(rows - 1, generator=generator)[: pieces - 1] + 1).tolist())
    return [order[a:b] for a, b in zip([0, *places], [*places, rows], strict=True)]


def step_loss(per_token, mask, parts: list[list[int]], mode: str) -> torch.Tensor:
    return sum(
        normalize(
            per_token[part],
            mask[part],
            mode,
            sequences_in_micro_batch=len(part),
            sequences_in_step=len(mask),
            tokens_in_step=mask.sum(),
        )
        for part in parts
    )


@pytest.mark.parametrize("seed", range(8))
def test_token_mean_does_not_depend_on_how_micro_batches_are_cut(seed):
    logps, old, advantages, mask = random_step(seed)
    whole, pieces = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    expected = policy_loss(whole, old, advantages, mask, **CLIP).sum() / mask.sum()
    got = step_loss(policy_loss(pieces, old, advantages, mask, **CLIP), mask, cut(len(mask), seed), "token_mean")
    expected.backward()
    got.backward()
    assert torch.allclose(got, expected, rtol=1e-12)
    assert torch.allclose(pieces.grad, whole.grad, rtol=1e-12)


def test_reference_mode_does_depend_on_how_micro_batches_are_cut():
    # sequences of 1, 1 and 4 tokens with losses 6, 0 and 3 per token
    mask = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    per_token = torch.tensor([[6.0, 0, 0, 0], [0, 0, 0, 0], [3, 3, 3, 3]])
    # one micro-batch: (6 + 0 + 12) / 6 tokens = 3, and the global token mean is the same number
    assert step_loss(per_token, mask, [[0, 1, 2]], "reference").item() == pytest.approx(3.0)
    assert step_loss(per_token, mask, [[0, 1, 2]], "token_mean").item() == pytest.approx(3.0)
    # {0} and {1, 2}: 6 x 1/3 + 12/5 x 2/3 = 3.6
    assert step_loss(per_token, mask, [[0], [1, 2]], "reference").item() == pytest.approx(3.6)
    # each alone is the mean of the sequence means: (6 + 0 + 3) / 3 = 3; {0, 1} and {2}: 3 x 2/3 + 3 x 1/3 = 3
    assert step_loss(per_token, mask, [[0], [1], [2]], "reference").item() == pytest.approx(3.0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_reference_mode_equals_token_mean_with_equal_tokens_in_one_micro_batch_per_rank(ranks):
    logps, old, advantages, _ = random_step(11)
    mask = torch.ones_like(logps)  # every sequence, hence every rank, has the same number of tokens
    per_token = policy_loss(logps, old, advantages, mask, **CLIP)
    parts = torch.arange(len(mask)).view(ranks, -1).tolist()
    assert torch.allclose(
        step_loss(per_token, mask, parts, "reference"), step_loss(per_token, mask, parts, "token_mean"), rtol=1e-9
    )


def test_a_micro_batch_without_response_tokens_adds_exactly_zero():
    empty = torch.zeros(2, 3)
    sizes = {"sequences_in_micro_batch": 2, "sequences_in_step": 8, "tokens_in_step": 10.0}
    assert normalize(empty, empty, "reference", **sizes).item() == 0.0
    assert normalize(empty, empty, "token_mean", **sizes).item() == 0.0


def test_an_unknown_normalization_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"loss_normalization='mean': use 'reference' or 'token_mean'"):
        sizes = {"sequences_in_micro_batch": 1, "sequences_in_step": 1, "tokens_in_step": 1.0}
        normalize(torch.ones(1), torch.ones(1), "mean", **sizes)
