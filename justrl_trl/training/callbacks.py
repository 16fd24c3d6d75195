"""Callback that pushes weights before the first rollout step and after every one."""

from transformers import TrainerCallback


class SyncAfterRolloutStep(TrainerCallback):
    """Push before the first rollout step (the server may hold anything after a resume) and after each one.

    Args:
        trainer: the `JustRLTrainer`.
    """

    def __init__(self, trainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self._trainer
        trainer.push_weights()
        trainer._metrics["train"].clear()
        trainer.clock.restart()

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        if self._trainer.accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()  # HF holds the schedule when DeepSpeed skips; the reference's goes on
        if state.global_step % args.optimizer_steps_per_rollout_step == 0:
            self._trainer.push_weights()
            self._trainer.record_rollout_step()
