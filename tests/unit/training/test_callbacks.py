"""The end of a run is a checkpoint, whatever the distance between checkpoints is."""

from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback

from justrl_trl.config import JustRLConfig
from justrl_trl.preflight.checkpoint_disk import checkpoint_disk
from justrl_trl.training.callbacks import SaveLastRolloutStep


@pytest.mark.parametrize(("rollout_steps", "every"), [(7, 3), (6, 3), (3, 0), (2, 5), (1, 1)])
def test_the_last_rollout_step_is_saved_and_the_plan_counts_what_is_saved(rollout_steps, every, tmp_path):
    args = JustRLConfig(output_dir=str(tmp_path), num_rollout_steps=rollout_steps, save_rollout_steps=every, use_cpu=True)
    state = TrainerState(max_steps=args.max_steps, save_steps=args.save_steps, logging_steps=args.logging_steps)
    saved = []
    for state.global_step in range(1, args.max_steps + 1):
        control = TrainerControl()
        for callback in (DefaultFlowCallback(), SaveLastRolloutStep()):  # in the order of the trainer
            callback.on_step_end(args, state, control)
        saved += [args.rollout_step(state.global_step)] if control.should_save else []
    assert saved == sorted({*range(every, rollout_steps + 1, every or rollout_steps + 1), rollout_steps} - {0})
    assert len(saved) == checkpoint_disk(args, 10, 10).made


def test_a_step_in_between_is_not_saved():
    control = SimpleNamespace(should_save=False)
    SaveLastRolloutStep().on_step_end(None, SimpleNamespace(global_step=11, max_steps=12), control)
    assert not control.should_save
