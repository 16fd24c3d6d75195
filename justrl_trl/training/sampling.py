"""Sample the responses of a rollout step: prompts go to the servers through rank 0, responses come back in waves.

Every function is called on every rank.
"""

import torch

from justrl_trl.distributed import gather_ragged
from justrl_trl.policy.packing import Sequence
from justrl_trl.rollouts.client import Sampling
from justrl_trl.rollouts.dispatch import Rollouts
from justrl_trl.rollouts.generation import Generation, progress_bar
from justrl_trl.rollouts.seeds import seed_for
from justrl_trl.training.old_logps import Scores

_WAVE_FILL = 0.9  # dealing whole sequences to ranks leaves their micro-batches a little short of full


def sampling_of(trainer, n: int, max_tokens: int, what: str = "rollouts") -> Sampling:
    """Sampling parameters of a request.

    Args:
        trainer: the `JustRLTrainer`.
        n: responses per prompt.
        max_tokens: response tokens at most.
        what: what the responses are for; other purposes have other seeds.
    """
    args = trainer.args
    return Sampling(
        n=n,
        max_tokens=max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p or 0.0,
        repetition_penalty=args.repetition_penalty,
        stop_token_ids=tuple(trainer.eos_token_ids),
        # no seed twice in a run: rollout steps are as many seeds apart as they have responses
        seed=seed_for(args.seed, what) + trainer.rollout_step * args.generation_batch_size,
    )


def sample_responses(trainer, prompt_ids: list[list[int]], n: int, scores: Scores | None) -> list[list[int]]:
    """Responses to this rank's prompts, one for each.

    Args:
        trainer: the `JustRLTrainer`.
        prompt_ids: each prompt `n` times, side by side; the server is asked once for each.
        n: responses per prompt.
        scores: takes responses that come early, so that they are scored while others are sampled; None: score all later.
    """
    accelerator, args = trainer.accelerator, trainer.args
    prompts = gather_ragged([torch.tensor(ids) for ids in prompt_ids], accelerator)
    rollouts = None
    if accelerator.is_main_process:
        sampling = sampling_of(trainer, n, trainer.max_completion_length)
        rollouts = Rollouts(trainer.pool, [p.tolist() for p in prompts[::n]], sampling)
    # a wave fills one micro-batch on every rank
    full = int(_WAVE_FILL * accelerator.num_processes * args.max_tokens_per_micro_batch)
    rows: dict[int, torch.Tensor] = {}
    with progress_bar("generation", len(prompts) // n, trainer.pool) as on_done:
        generation = Generation(rollouts, n, full if scores else None, accelerator, on_done)
        for wave, more in generation.waves(trainer.push_weights, trainer.save_before_giving_up):
            rows |= wave
            if scores and more:
                with trainer.clock.stage("overlapped_scoring"):
                    scores.score(Sequence(torch.cat([prompts[i], row]), len(prompts[i]), row=i) for i, row in wave.items())
    start = accelerator.process_index * len(prompt_ids)
    return [rows[i].tolist() for i in range(start, start + len(prompt_ids))]


def sample_on_rank_zero(trainer, what: str, rollouts: Rollouts | None, prompts: int) -> None:
    """Fill `rollouts`, whose responses rank 0 alone needs.

    Args:
        trainer: the `JustRLTrainer`.
        what: title of the progress bar.
        rollouts: on rank 0.
        prompts: number of prompts in it.
    """
    with progress_bar(what, prompts, trainer.pool) as on_done:
        generation = Generation(rollouts, 1, None, trainer.accelerator, on_done)
        generation.finish(trainer.push_weights, trainer.save_before_giving_up)
