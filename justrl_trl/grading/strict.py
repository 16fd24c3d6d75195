"""The recipe's reward: +1 or -1 by one string comparison of the last box.

`dapo_score` is the verifier JustRL trains with (verl's `math_dapo` reward, `strict_box_verify=True`). It departs from
the usual "math-verify" reward on purpose: the last `\\boxed{...}` must lie in the last 100 characters and its content
must equal the ground truth character by character, so `05`, ` 5 `, `x=5` or `\\dfrac` for `\\frac` earn -1.
`strict_box=False` is the rule stock DAPO uses instead: the text after the last `Answer:`, compared after Minerva's
normalisation. Nothing is evaluated, nothing raises on model text, and every pass over a string takes linear time.

Sources: JustRL `train/verl/utils/reward_score/math_dapo.py` (Apache-2.0) and its DAPO reward manager, whose recorded
answers are in `tests/unit/vectors/`; the normalisation table is Minerva's (Lewkowycz et al. 2022, arXiv 2206.14858) as
verl spells it; the length penalty is DAPO's soft overlong punishment (arXiv 2503.14476). To train with the rule, pass
`reward_funcs=[dapo_reward]`.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CORRECT, WRONG = 1.0, -1.0
STRICT_WINDOW = 100  # characters; the whole `\boxed{...}` must fit in it
MINERVA_WINDOW = 300  # characters; the reference cuts every response to this before looking
NO_ANSWER = "[INVALID]"  # what the Minerva rule reports, and compares, when there is no `Answer:`

_BOX = "\\boxed{"
# `\s*` may give back its last blank so that the group is never empty, and a match runs to the end of its line: of two
# `Answer:` on one line the first wins. Both are the reference's behaviour.
_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)

# Applied in this order, each to the whole string: later entries see what earlier ones left (`mbox` becomes `text`).
_REWRITES = (
    ("an ", ""), ("a ", ""), (".$", "$"), (r"\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (r",\text{and}", ","), (r"\text{and}", ","), (r"\text{m}", r"\text{}"),
)  # fmt: skip
# Units and filler. They are cut wherever they occur, inside words too ("always" loses "ways"), as in the reference.
_REMOVED = (
    *"square ways integers dollars mph inches hours km units \\ldots sue points feet minutes digits cents".split(),
    *"degrees cm gm pounds meters meals edges students childrentickets multiples \\text{s} \\text{.}".split(),
    "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}", r"\text{}",
    r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots",
)  # fmt: skip
_SHORT_FRAC = re.compile(r"frac([^{])(.)")  # \frac12 -> \frac{1}{2}
_SHORT_SQRT = re.compile(r"sqrt([^{])")  # \sqrt2 -> \sqrt{2}


@dataclass(frozen=True)
class DapoScore:
    """What the verifier says about one response."""

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


def _unwrap_shortest(line: str, opening: str) -> str:
    """Replace each `opening...}` in one line by what is between them, up to the first `}`. Linear time."""
    pieces, start = [], 0
    while (found := line.find(opening, start)) >= 0 and (end := line.find("}", found + len(opening))) >= 0:
        pieces += [line[start:found], line[found + len(opening) : end]]
        start = end + 1
    return "".join(pieces) + line[start:]


def _normalize_line(line: str) -> str:
    """Minerva's LaTeX pass over one line: keep the first `$...$`, then drop text, bold, overline and box commands."""
    if "$" not in line and "{" not in line:
        return line
    dollars = line.split("$", 2)
    if len(dollars) == 3:
        line = f"${dollars[1]}$"
    for opening in (r"\text{", r"\textbf{", r"\overline{"):
        line = _unwrap_shortest(line, opening)
    # The box is greedy, unlike the others: from the first `\boxed{` to the last `}`.
    start, end = line.find(_BOX), line.rfind("}")
    if 0 <= start < end:
        line = line[:start] + line[start + len(_BOX) : end] + line[end + 1 :]
    return line


def normalize_answer(answer: str) -> str:
    """Minerva's normal form of a final answer: what follows the last `=`, without units, blanks or `$`."""
    answer = answer.rpartition("=")[2]
    for before, after in _REWRITES:
        answer = answer.replace(before, after)
    for word in _REMOVED:
        answer = answer.replace(word, "")
    answer = "\n".join(map(_normalize_line, answer.split("\n")))
    answer = _SHORT_FRAC.sub(r"frac{\1}{\2}", answer)
    answer = _SHORT_SQRT.sub(r"sqrt{\1}", answer)
    answer = answer.replace("$", "")
    without_commas = answer.replace(",", "")
    return (without_commas if without_commas.isdigit() else answer).strip()


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
        answers = _ANSWER.findall(response[-MINERVA_WINDOW:])
        prediction = normalize_answer(answers[-1] if answers else NO_ANSWER)
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
