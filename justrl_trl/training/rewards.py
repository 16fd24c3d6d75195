"""Reward functions of a run: the recipe's strict verifier, or what the ablations of Figure 3 use.

`verifier: robust` pays the same +1 and -1, by the rules of the evaluation grader (DeepScaleR's: LaTeX normal forms, then
algebra) instead of character by character. `overlong_buffer_length` adds DAPO's soft penalty as a reward of its own, so that
both are logged. The reference's configuration of these ablations is not released; the paper names the verifier's origin, the
4k buffer and the factor.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from justrl_trl.grading.single import shared_pool
from justrl_trl.grading.strict import CORRECT, WRONG, completion_text, dapo_reward, overlong_penalty

if TYPE_CHECKING:
    from justrl_trl.config import JustRLConfig

RewardFunction = Callable[..., list[float]]


def reward_functions(training: "JustRLConfig") -> list[RewardFunction]:
    """TRL reward functions, the verifier first; their sum is the reward."""
    functions: list[RewardFunction] = [robust_reward if training.verifier == "robust" else dapo_reward]
    if training.overlong_buffer_length:
        functions.append(
            overlong_reward(training.max_completion_length, training.overlong_buffer_length, training.overlong_penalty_factor)
        )
    return functions


def robust_reward(
    completions: list,
    solution: list,
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float]:
    """TRL reward function: `grading.single.grade_answer` on each completion, in {-1.0, +1.0}.

    Symbolic work runs in a killable process, 5 seconds an answer at most; what was not graded is wrong and counted
    (`grading/timeouts`, as a share of the completions, and the like), never fatal.

    Args:
        completions: [num_completions] strings or message lists.
        solution: [num_completions] answers.
        log_extra, log_metric: TRL's hooks.
    """
    pool = shared_pool()
    before = pool.counts()
    verdicts = pool.grade(zip(map(completion_text, completions), solution, strict=True))
    if log_extra is not None:
        log_extra("solution", list(solution))
    if log_metric is not None:
        log_metric("accuracy", sum(verdict.correct for verdict in verdicts) / max(len(verdicts), 1))
        for name, count in pool.counts().items():
            log_metric(f"grading/{name}", (count - before[name]) / max(len(verdicts), 1))
    return [CORRECT if verdict.correct else WRONG for verdict in verdicts]


def overlong_reward(max_response_length: int, buffer_length: int, penalty_factor: float) -> RewardFunction:
    """A TRL reward function: `grading.strict.overlong_penalty` of each completion, from 0 down to `-penalty_factor`."""

    def overlong(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [overlong_penalty(len(ids), max_response_length, buffer_length, penalty_factor) for ids in completion_ids]

    return overlong
