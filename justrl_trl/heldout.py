"""Problems that are never trained on, sampled before and after."""

import torch

from justrl_trl.collectives import raise_together
from justrl_trl.server import ServerError

_SEED_OFFSET = 1 << 15  # no rollout of the same rollout step has these seeds


def heldout_accuracy(trainer) -> float | None:
    """Share of rewarded responses, `heldout_generations` to each held-out problem, from the weights that the servers hold.

    Called on all ranks; touches no training state. None without held-out problems.
    """
    if trainer.heldout_dataset is None:
        return None
    accelerator = trainer.accelerator
    error, accuracy = None, torch.zeros(1, dtype=torch.float64, device=accelerator.device)
    if accelerator.is_main_process:
        try:
            accuracy[0] = _sample(trainer)
        except ServerError as caught:
            error = caught
    raise_together(error, accelerator)
    return accelerator.reduce(accuracy, "sum").item()


def _sample(trainer) -> float:
    n = trainer.args.heldout_generations
    rows = [row for row in trainer.heldout_dataset for _ in range(n)]
    prompt_ids = trainer._tokenize_prompts(list(trainer.heldout_dataset["prompt"]))[0]
    sampling = trainer.sampling(n, trainer.max_completion_length, _SEED_OFFSET)
    with trainer.progress_bar(len(prompt_ids)) as on_done:
        responses = trainer.pool.generate(prompt_ids, sampling, on_done)
    texts = trainer.processing_class.batch_decode(responses, skip_special_tokens=True)
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = trainer.reward_funcs[0](prompts=[row["prompt"] for row in rows], completions=completions, **columns)
    return sum(reward > 0 for reward in rewards) / len(rewards)
