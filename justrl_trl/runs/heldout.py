"""Held-out problems, sampled before and after training with the training's own settings and rewards."""

from transformers import TrainerCallback

from justrl_trl.distributed import on_rank_zero
from justrl_trl.jsonl import append_jsonl
from justrl_trl.rollouts.dispatch import Rollouts
from justrl_trl.runs.folder import RunFolder
from justrl_trl.training.sampling import sample_on_rank_zero, sampling_of


class HeldOut(TrainerCallback):
    """Records the accuracy on held-out problems before the first rollout step and after the last one.

    Args:
        folder: takes `heldout.jsonl`.

    Attributes:
        trainer: the `JustRLTrainer`; set after construction.
    """

    def __init__(self, folder: RunFolder):
        self._folder = folder
        self.trainer = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._record(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._record(args, state)

    def _record(self, args, state) -> None:
        accuracy = heldout_accuracy(self.trainer)
        if accuracy is not None and state.is_world_process_zero:
            append_jsonl(self._folder.heldout, {"rollout_step": args.rollout_step(state.global_step), "accuracy": accuracy})


def heldout_accuracy(trainer) -> float | None:
    """Share of rewarded responses, `heldout_generations` to each held-out problem, from the weights that the servers hold.

    Called on all ranks; touches no training state. None without held-out problems.
    """
    if trainer.heldout_dataset is None:
        return None
    rollouts, n = None, trainer.args.heldout_generations
    prompts = trainer._tokenize_prompts(list(trainer.heldout_dataset["prompt"]))[0]
    if trainer.accelerator.is_main_process:
        rollouts = Rollouts(trainer.pool, prompts, sampling_of(trainer, n, trainer.max_completion_length, "held out"))
    sample_on_rank_zero(trainer, "held-out problems", rollouts, len(prompts))
    return on_rank_zero(lambda: _rewarded(trainer, rollouts.responses()), trainer.accelerator)


def _rewarded(trainer, responses: list[list[int]]) -> float:
    n = trainer.args.heldout_generations
    rows = [row for row in trainer.heldout_dataset for _ in range(n)]
    texts = trainer.processing_class.batch_decode(responses, skip_special_tokens=True)
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = trainer.reward_funcs[0](prompts=[row["prompt"] for row in rows], completions=completions, **columns)
    return sum(reward > 0 for reward in rewards) / len(rewards)
