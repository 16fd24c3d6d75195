"""Problems that are never trained on, sampled before and after."""

from justrl_trl.distributed import on_rank_zero
from justrl_trl.rollouts.dispatch import Rollouts


def heldout_accuracy(trainer) -> float | None:
    """Share of rewarded responses, `heldout_generations` to each held-out problem, from the weights that the servers hold.

    Called on all ranks; touches no training state. None without held-out problems.
    """
    if trainer.heldout_dataset is None:
        return None
    rollouts, n = None, trainer.args.heldout_generations
    prompts = trainer._tokenize_prompts(list(trainer.heldout_dataset["prompt"]))[0]
    if trainer.accelerator.is_main_process:
        rollouts = Rollouts(trainer.pool, prompts, trainer.sampling(n, trainer.max_completion_length, "held out"))
    trainer.finish_rollouts("held-out problems", rollouts, len(prompts))
    return on_rank_zero(lambda: _rewarded(trainer, rollouts.responses()), trainer.accelerator)


def _rewarded(trainer, responses: list[list[int]]) -> float:
    n = trainer.args.heldout_generations
    rows = [row for row in trainer.heldout_dataset for _ in range(n)]
    texts = trainer.processing_class.batch_decode(responses, skip_special_tokens=True)
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = trainer.reward_funcs[0](prompts=[row["prompt"] for row in rows], completions=completions, **columns)
    return sum(reward > 0 for reward in rewards) / len(rewards)
