"""The training step is exact: packed and fused here, padded in stock TRL, one gradient.

One process, float32, four optimizer steps of one rollout step: the first on-policy, the others off-policy with tokens beyond
the clips. Two ranks are in `tests/integration/test_ranks.py`.
"""

import time
from types import SimpleNamespace

import pytest
import torch

from justrl_trl.errors import ConfigError, ServerError
from justrl_trl.rollouts.client import RolloutClient
from justrl_trl.rollouts.pool import RolloutPool
from justrl_trl.training.old_logps import Scores
from justrl_trl.weights.gap import Gap
from tests.side_by_side import Case, build, error, response, run
from tests.unit.fake_server import FakeServer
from tests.unit.rollouts.test_client import COMPLETIONS, MODELS

FIRST, LATER = 1e-5, 1e-4  # relative error of the whole gradient; later ones carry the difference of earlier updates


KINDS = {"untied": {}, "tied": {"tied": True}, "lora": {"lora": True, "learning_rate": 2e-2}}


@pytest.fixture(scope="module")
def stock() -> dict[str, dict]:
    """What stock TRL does, once per kind of model."""
    return {kind: run("stock", **case) for kind, case in (KINDS | {"twice": {"num_iterations": 2}}).items()}


def assert_same(ours: dict, other: dict) -> None:
    errors = [error(a, b) for a, b in zip(ours["gradients"], other["gradients"], strict=True)]
    assert errors[0] <= FIRST and max(errors[1:]) <= LATER, errors
    assert ours["losses"] == pytest.approx(other["losses"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("backend", ["liger", "trl"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_stock_trl(stock, kind, backend):
    ours = run("ours", **KINDS[kind], changes={"loss_backend": backend})
    assert len(ours["gradients"]) == 4
    assert_same(ours, stock[kind])
    # the comparison reaches what it is about: tokens beyond both clips, weighted differently by everything that could be wrong
    metrics = ours["metrics"][0]
    assert metrics["clip_ratio/low_mean"] > 0.01 and metrics["clip_ratio/high_mean"] > 0.01


def test_gradient_checkpointing_changes_nothing(stock):
    assert_same(run("ours", gradient_checkpointing=True), stock["untied"])


def test_two_passes_over_a_rollout_step_equal_stock_trl(stock):
    ours = run("ours", num_iterations=2)
    assert len(ours["gradients"]) == 8
    assert_same(ours, stock["twice"])


@pytest.mark.parametrize("budget", [104, 250, 100_000])
def test_any_token_budget_gives_the_same_gradient(stock, budget):
    assert_same(run("ours", budget=budget), stock["untied"])


def test_scoring_while_others_are_sampled_changes_nothing(stock):
    assert_same(run("ours", waves=[1, 30]), stock["untied"])


@pytest.mark.parametrize("early", [True, False])
def test_responses_from_a_server_train_as_the_same_ones_from_a_list(stock, tmp_path, early):
    """The whole way: prompts to a server, waves of responses back, scored while others are sampled, shuffled, trained."""
    changes = {"score_while_sampling": early, "seed": 1}
    trainer = build(Case("served", budget=104, changes=changes), str(tmp_path))
    longest, vocabulary, eos = 40, trainer.model.config.vocab_size, trainer.processing_class.eos_token_id

    def answer(method, path, body):
        if path != COMPLETIONS:
            return 200, MODELS if path == "/v1/models" else {"weight_version": "1"}
        time.sleep(0.02 * (body["seed"] % 3))  # they come back in another order than they were asked for
        ids = [response(body["prompt"], copy, longest, vocabulary, eos) for copy in range(body["n"])]
        return 200, {"choices": [{"index": i, "token_ids": one} for i, one in enumerate(ids)]}

    server = FakeServer(answer)
    trainer.pool = RolloutPool([RolloutClient(server.url, "key")], max_num_seqs=8, say=lambda line: None)
    trainer.pool.current(trainer.pool.members, "1")
    waves = []
    original = Scores.score
    scored = lambda self, sequences: (waves.append(len(sequences := list(sequences))), original(self, sequences))[1]  # noqa: E731
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Scores, "score", scored)
            trainer.train()
    finally:
        trainer.pool.close()
        server.close()
    assert (len(waves) > 2) == early
    assert_same(trainer.seen, stock["untied"])


class OtherPolicy:
    """A `WeightSync` whose servers sample something else than the trainer trains."""

    def gap(self, sequences, logps):
        assert len(sequences) == 8 and len(logps) == sum(s.response_length for s in sequences)
        return {"http://other": Gap(largest=3.0, mean=0.6, k3=0.4)}


def test_responses_of_another_policy_are_not_trained_on(tmp_path):
    trainer = build(Case("ours", changes={"gap_responses": 8, "gap_limit": 0.5}), str(tmp_path))
    trainer.weight_push.sync, trainer.pool = OtherPolicy(), SimpleNamespace(say=print)
    with pytest.raises(ServerError, match=r"http://other by 0\.600 .* of 8 responses > gap_limit=0\.5"):
        trainer.train()
    assert trainer.state.global_step == 0 and trainer.seen["gradients"] == []


def test_adapters_are_scored_without_their_dropout():
    """Otherwise the first optimizer step would already see ratios that no update has made: 1.01 and 7 % clipped, at 0.05."""
    plain, dropped = (
        run("ours", lora=True, lora_dropout=rate, learning_rate=1e-9, optimizer_steps=1)["metrics"][0] for rate in (0.0, 0.3)
    )
    assert plain["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert dropped["entropy"] == pytest.approx(plain["entropy"], rel=1e-6)


def test_masking_after_scoring_changes_nothing():
    masked = {"mask_truncated_completions": True}
    assert_same(run("ours", waves=[40], changes=masked), run("ours", changes=masked))


def test_reference_normalization_is_the_same_from_both_kernels_and_another_objective():
    liger, trl, token_mean = (
        run("ours", budget=250, changes={"loss_backend": backend, "loss_normalization": mode})
        for backend, mode in (("liger", "reference"), ("trl", "reference"), ("liger", "token_mean"))
    )
    assert_same(liger, trl)
    assert error(liger["gradients"][0], token_mean["gradients"][0]) > 1e-2


def test_in_one_micro_batch_both_normalizations_are_one():
    reference = run("ours", budget=100_000, changes={"loss_normalization": "reference"})
    assert_same(reference, run("ours", budget=100_000))


def test_metrics_of_a_rollout_step_are_there_and_sane():
    seen = run("ours", rollout_steps=2)
    for row in seen["metrics"][:2]:
        assert 0 < row["entropy_reference"] < row["entropy"]
        assert 1 <= row["load_imbalance"] < 1.5
        assert row["skipped_optimizer_steps"] == 0 and row["memory/peak_gib"] > 0
        assert row["advantages/min"] < 0 < row["advantages/max"] and row["advantages/std"] > 0


def test_the_entropy_of_the_scoring_pass_is_that_of_the_sampling_policy():
    first = run("ours")["metrics"][0]["entropy"]
    other = run("ours", budget=104, learning_rate=1e-6)["metrics"][0]["entropy"]
    assert first == pytest.approx(other, rel=1e-5)  # before the first update, whatever the cut


def weights_of(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])


def test_a_gradient_that_is_not_finite_is_left_out_and_the_run_goes_on(tmp_path):
    # in the second optimizer step of the second rollout step: the first one has lr 0
    case = Case("ours", plant_nan_at={5: 0}, rollout_steps=3, changes={"warmup_rollout_steps": 2})
    trainer = build(case, str(tmp_path))
    before = []
    trainer_step = trainer.training_step

    def keep(*args, **kwargs):
        before.append(weights_of(trainer))
        return trainer_step(*args, **kwargs)

    trainer.training_step = keep
    trainer.train()
    assert torch.equal(before[6], before[5]) and not torch.equal(before[5], before[4]) and not torch.equal(before[7], before[6])
    assert torch.isfinite(weights_of(trainer)).all()
    rows = [row for row in trainer.seen["metrics"] if "reward" in row]
    assert [row["skipped_optimizer_steps"] for row in rows] == [0, 1, 0]
    # the schedule does not lag behind
    assert trainer.seen["lr"] == pytest.approx([k / 2 * 1e-3 for k in (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2)])


def test_nothing_but_skipped_steps_ends_the_run():
    with pytest.raises(RuntimeError, match=r"2 optimizer steps in a row .*max_skipped_steps=2.*resume_from_checkpoint"):
        run("ours", plant_nan_at={1: 0, 2: 0}, changes={"max_skipped_steps": 2})


def test_trls_evaluation_is_refused_with_what_takes_its_place(tmp_path):
    trainer = build(Case("ours"), str(tmp_path))
    with pytest.raises(ConfigError, match="validation_benchmarks.*recipes/evaluate.py"):
        trainer.evaluate(trainer.train_dataset.select(range(8)))


def test_no_padding_goes_through_the_model(tmp_path):
    trainer, computed = build(Case("ours"), str(tmp_path)), []
    trainer.model.get_input_embeddings().register_forward_pre_hook(lambda module, args: computed.append(args[0].numel()))
    trainer.train()
    row = trainer.seen["metrics"][0]
    assert sum(computed) == 2 * row["num_tokens"] and row["padding_share"] == 0  # once scored, once trained


@pytest.mark.parametrize("iterations", [1, 2])
def test_trained_tokens_are_all_response_tokens_of_the_rollout_step(iterations):
    row = run("ours", num_iterations=iterations)["metrics"][0]
    assert row["tokens/trained"] == iterations * row["tokens/generated"] > 0


def test_in_one_optimizer_step_the_objective_is_that_of_untouched_trl():
    """With one optimizer step per rollout step TRL's average denominator is this step's own."""
    ours, untouched = (run(trainer, optimizer_steps=1) for trainer in ("ours", "trl"))
    assert error(ours["gradients"][0], untouched["gradients"][0]) <= FIRST


def test_truncated_responses_can_be_masked_as_in_stock_trl():
    ours, stock = (run(trainer, changes={"mask_truncated_completions": True}) for trainer in ("ours", "stock"))
    assert_same(ours, stock)


def test_weight_decay_is_on_every_parameter_and_the_clip_is_global(tmp_path):
    trainer = build(Case("ours", optimizer_steps=1, changes={"weight_decay": 0.1, "max_grad_norm": 0.5}), str(tmp_path))
    before = weights_of(trainer)
    trainer.train()
    parameter = torch.nn.Parameter(before.clone())
    parameter.grad = trainer.seen["gradients"][0].clone()  # as the optimizer got it: clipped
    assert float(parameter.grad.norm()) == pytest.approx(0.5, rel=1e-4)
    torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1).step()
    assert error(weights_of(trainer) - before, parameter.detach() - before) < 1e-3
