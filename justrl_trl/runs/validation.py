"""Callback that scores benchmarks during training, on the rollout servers, with the weights just pushed.

The reference validates before training, every 50 rollout steps and at the end, on AIME 2024, AIME 2025 and AMC 2023: 32
responses to a problem at temperature 0.7 and top-p 0.9, up to 31,744 tokens, after the training prompt (a blank line before
the boxed instruction, where `recipes/evaluate.py` has a space), graded by math-verify. Figure 1 of the paper is this curve.

Nothing of the training state is touched: no random number of the trainer is drawn, no weight, no data position.
"""

import os
from dataclasses import asdict
from typing import Any

from transformers import Trainer, TrainerCallback

from justrl_trl.config import JustRLConfig
from justrl_trl.data.problems import BOXED_SUFFIX
from justrl_trl.distributed import on_rank_zero
from justrl_trl.evaluation.grades import grade_of
from justrl_trl.evaluation.results import scores_of
from justrl_trl.evaluation.sampling import SampleRequests, check_fits, eval_sampling, prompt_ids, requests_of
from justrl_trl.evaluation.tasks import find_tasks
from justrl_trl.grading.pool import GradingPool
from justrl_trl.jsonl import append_jsonl, read_jsonl
from justrl_trl.reports.scores import BenchmarkScore
from justrl_trl.runs.folder import RunFolder
from justrl_trl.training.sampling import sample_on_rank_zero

_MOST_WORKERS = 16  # each is an interpreter that imports sympy; a node has other work for its cores


class Validate(TrainerCallback):
    """Validates before the first rollout step, after every `validation_every`, and after the last; each time when the rollout
    step before it is logged and its checkpoint saved, so that a failure here loses nothing.

    Args:
        training: names the benchmarks and how they are sampled.
        tokenizer: of the policy.
        folder: takes `validation.jsonl`.

    Attributes:
        tasks: the benchmarks with their problems.
        trainer: the `JustRLTrainer`; set after construction.

    Raises:
        DataError: an unknown benchmark, one whose data cannot be used, or a prompt that leaves no room for a response.
    """

    def __init__(self, training: JustRLConfig, tokenizer, folder: RunFolder):
        self._training, self._tokenizer, self._folder = training, tokenizer, folder
        self.trainer = None
        with training.distributed_state.local_main_process_first():  # the Hub is asked once per node
            self.tasks = find_tasks(
                training.validation_benchmarks, data_dir=training.validation_data_dir, samples=training.validation_samples
            )
        self._requests = [
            request
            for task in self.tasks
            for request in requests_of(
                task, prompt_ids(tokenizer, task.problems, BOXED_SUFFIX, training.chat_template_kwargs), training.seed
            )
        ]
        longest, context = training.validation_max_new_tokens, training.vllm_max_model_length
        check_fits(self._requests, longest, context, "A rollout server", option="--validation_max_new_tokens")

    def on_step_begin(self, args, state, control, **kwargs):
        # not when the rollout step before ends: its metrics are logged and its checkpoint is saved after that
        if state.global_step % (args.validation_every * args.optimizer_steps_per_rollout_step) == 0:
            self._validate(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._validate(state)

    def _validate(self, state) -> None:
        """On all ranks, unless this rollout step has been validated: a resumed run begins where another one has been."""
        trainer, args = self.trainer, self._training
        step = args.rollout_step(state.global_step)
        if on_rank_zero(
            lambda: any(row["rollout_step"] == step for row in read_jsonl(self._folder.validation)), trainer.accelerator
        ):
            return
        with trainer.clock.stage("validation"):
            sampler = None
            if trainer.accelerator.is_main_process:
                sampling = eval_sampling(
                    tuple(trainer.eos_token_ids),
                    max_new_tokens=args.validation_max_new_tokens,
                    temperature=args.validation_temperature,
                    top_p=args.validation_top_p,
                )
                sampler = SampleRequests(trainer.pool, self._requests, sampling)
            sample_on_rank_zero(trainer, "validation", sampler, len(self._requests))
            scores = on_rank_zero(lambda: self._grade(sampler), trainer.accelerator)
        # not GRPOTrainer.log, which would report the completions of the last rollout step once more
        Trainer.log(trainer, metrics_of(scores))
        if trainer.accelerator.is_main_process:
            for name, one in scores.items():
                append_jsonl(self._folder.validation, {"rollout_step": step, "benchmark": name, **asdict(one)})
            trainer.pool.say(f"validation after rollout step {step}: {', '.join(map(_words, scores, scores.values()))}")

    def _grade(self, sampler: SampleRequests) -> dict[str, BenchmarkScore]:
        """Rank 0: scores by benchmark."""
        responses = [sampler.take(index) for index in range(len(self._requests))]
        texts = [self._tokenizer.decode(response.ids, skip_special_tokens=True) for response in responses]
        answers = {(task.name, i): problem.answer for task in self.tasks for i, problem in enumerate(task.problems)}
        truths = [answers[r.request.benchmark, r.request.problem] for r in responses]
        with GradingPool(workers=min(_MOST_WORKERS, len(os.sched_getaffinity(0)))) as pool:
            verdicts = pool.grade(zip(texts, truths, strict=True), self._training.validation_grader)
        grades = [
            grade_of(response.request.key, text, len(response.ids), response.truncated, verdict)
            for response, text, verdict in zip(responses, texts, verdicts, strict=True)
        ]
        return scores_of(self.tasks, grades)


def metrics_of(scores: dict[str, BenchmarkScore]) -> dict[str, float]:
    """For the trackers: fractions, under `validation/`."""
    metrics: dict[str, Any] = {}
    for name, one in scores.items():
        metrics[f"validation/{name}/avg@{one.samples}"] = one.avg
        metrics[f"validation/{name}/pass@{one.samples}"] = one.pass_at[one.samples]
        for field in ("stderr", "mean_tokens", "truncated", "no_box"):
            metrics[f"validation/{name}/{field}"] = getattr(one, field)
    return {name: value for name, value in metrics.items() if value is not None}


def _words(name: str, one: BenchmarkScore) -> str:
    error = "" if one.stderr is None else f" ± {one.stderr:.1%}"
    return f"{name} avg@{one.samples} {one.avg:.1%}{error} ({one.mean_tokens:,.0f} tokens, cut {one.truncated:.0%})"
