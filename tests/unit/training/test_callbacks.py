"""The end of a run is a checkpoint, whatever the distance between checkpoints is, and the plan counts it."""

import pytest
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback

from justrl_trl.config import JustRLConfig
from justrl_trl.preflight.checkpoint_disk import checkpoint_disk


@pytest.mark.parametrize(("rollout_steps", "every"), [(7, 3), (6, 3), (3, 0), (2, 5), (1, 1)])
def test_transformers_saves_the_last_rollout_step_and_the_plan_counts_what_is_saved(rollout_steps, every, tmp_path):
    args = JustRLConfig(output_dir=str(tmp_path), num_rollout_steps=rollout_steps, save_rollout_steps=every, use_cpu=True)
    state = TrainerState(max_steps=args.max_steps, save_steps=args.save_steps, logging_steps=args.logging_steps)
    saved = []
    for state.global_step in range(1, args.max_steps + 1):
        control = TrainerControl()
        DefaultFlowCallback().on_step_end(args, state, control)
        saved += [args.rollout_step(state.global_step)] if control.should_save else []
    assert saved == sorted({*range(every, rollout_steps + 1, every or rollout_steps + 1), rollout_steps} - {0})
    assert len(saved) == checkpoint_disk(args, 10, 10).made
