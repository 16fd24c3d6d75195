"""The recipe's reward: +1 or -1 by one string comparison of the last box.

`dapo_score` is the verifier JustRL trains with (verl's `math_dapo` reward, `strict_box_verify=True`). It departs from
the usual "math-verify" reward on purpose: the last `\\boxed{...}` must lie in the last 100 characters and its content
must equal the ground truth character by character, so `05`, ` 5 `, `x=5` or `\\dfrac` for `\\frac` earn -1.
`strict_box=False` is the rule of stock DAPO (`minerva`), which no recipe uses. Nothing is evaluated, nothing raises on
model text, and every pass over a string takes linear time.

Sources: JustRL `train/verl/utils/reward_score/math_dapo.py` (Apache-2.0) and its DAPO reward manager, whose recorded
answers are in `tests/unit/vectors/`; the length penalty is DAPO's soft overlong punishment (arXiv 2503.14476). To train
with the rule, pass `reward_funcs=[dapo_reward]`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from justrl_trl.grading.minerva import last_answer, normalize_answer

CORRECT, WRONG = 1.0, -1.0
STRICT_WINDOW = 100  # characters; the whole `\boxed{...}` must fit in it

_BOX = "\\boxed{"


@dataclass(frozen=True)
class DapoScore:
    """Score of one response."""

    score: float  # +1.0 or -1.0
    prediction: str | None  # the extracted answer; None when the strict rule found no closed box


def last_boxed(text: str) -> str | None:
    """Content of the last literal `\\boxed{` in `text`; None when there is none or it never closes.

    An unclosed last box hides earlier ones, and every brace counts, `\\{` and `\\}` included, as in the reference.
    """
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOX)
    for position in range(begin, len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return text[begin:position]
    return None


def dapo_score(response: str, ground_truth: Any, strict_box: bool = True) -> DapoScore:
    """Score one decoded response against its ground truth.

    Args:
        response: decoded completion without special tokens; any `str`, NUL and lone surrogates included.
        ground_truth: the bare answer, normally a string. Nothing is converted: a number never equals text and scores
            -1. `None` equals "no box found", so the strict rule gives it +1 when there is no box, as the reference
            does; `load_problems` and `dapo_reward` refuse it.
        strict_box: True for the recipe's boxed rule, False for the `Answer:` rule with Minerva's normalisation.
    """
    if strict_box:
        prediction = last_boxed(response[-STRICT_WINDOW:])
        correct = prediction == ground_truth
    else:
        prediction = last_answer(response)
        correct = isinstance(ground_truth, str) and prediction == normalize_answer(ground_truth)
    return DapoScore(CORRECT if correct else WRONG, prediction)


def overlong_penalty(response_length: int, max_response_length: int, buffer_length: int, penalty_factor: float = 1.0) -> float:
    """Soft length penalty, added to the score: `min(0, -(L - (max - buffer)) / buffer * factor)`; lengths in tokens.

    0 up to `max_response_length - buffer_length`, `-penalty_factor` at `max_response_length`, and lower beyond it: the
    reference has no lower clamp (DAPO's own formula has one). With 15360/4096/1.0 the ramp starts at 11,264.

    Raises:
        ValueError: for lengths or a factor that make no ramp.
    """
    if not 0 < buffer_length <= max_response_length:
        raise ValueError(
            f"buffer_length={buffer_length} with max_response_length={max_response_length}: the penalty grows over "
            "the last `buffer_length` tokens of the budget, so it must lie between 1 and `max_response_length`. "
            "The DAPO paper uses 4096 of 20480; switch the penalty off to have none."
        )
    if not (math.isfinite(penalty_factor) and penalty_factor >= 0):
        raise ValueError(
            f"penalty_factor={penalty_factor} is negative or not finite: below 0 the penalty would pay for length. "
            "Use 0 or more; 1.0 is the reference's value."
        )
    if response_length < 0:
        raise ValueError(f"response_length={response_length} is negative: pass the number of completion tokens.")
    excess = response_length - (max_response_length - buffer_length)
    return -excess / buffer_length * penalty_factor if excess > 0 else 0.0


def completion_text(completion: Any) -> str:
    """Text of one completion as TRL passes it: a string, or one assistant turn as a list of messages."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, list) and completion and isinstance(completion[-1], dict):
        content = completion[-1].get("content") or ""  # None when a chat parser found no final text: no answer, so -1
        if isinstance(content, str):
            return content
    raise TypeError(
        f"a completion of type {type(completion).__name__} is neither text nor a list of chat messages with text: "
        "dapo_reward reads text-only completions, so use it with a text-only dataset."
    )


def dapo_reward(
    completions: list,
    solution: list,
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float]:
    """TRL reward function: the strict boxed rule on each completion, in {-1.0, +1.0}.

    TRL decodes with `skip_special_tokens=True`, which already removes the end-of-sequence string that the reference
    strips after decoding. The message is the last of a conversational completion. Other columns and the rest of TRL's
    keyword arguments (`prompts`, `completion_ids`, `trainer_state`, ...) arrive in `kwargs` and are not used.

    Args:
        completions: [num_completions] strings or message lists.
        solution: [num_completions] bare answers, the dataset's `solution` column.
        log_extra, log_metric: TRL's hooks; they receive solution and prediction of every completion, and the accuracy.

    Raises:
        ValueError: when the two lengths differ, or a solution is None (the rule would pay +1 for giving no answer).
    """
    if len(completions) != len(solution):
        raise ValueError(
            f"{len(completions)} completions but {len(solution)} solutions: the rule compares them one to one. "
            "Pass the dataset's `solution` column repeated once per completion, as TRL does."
        )
    missing = [index for index, truth in enumerate(solution) if truth is None]
    if missing:
        raise ValueError(
            f"solution is None for completions {missing[:10]} ({len(missing)} in all): a completion without an answer "
            "would count as correct. Load the data with `load_problems`, which names the rows that lack an answer."
        )
    graded = [dapo_score(completion_text(text), truth) for text, truth in zip(completions, solution, strict=True)]
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("prediction", [grade.prediction for grade in graded])
    if log_metric is not None:
        log_metric("accuracy", sum(grade.score == CORRECT for grade in graded) / max(len(graded), 1))
    return [grade.score for grade in graded]
