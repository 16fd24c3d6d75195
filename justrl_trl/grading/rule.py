r"""The evaluation grader of the reference: is the last `\boxed{...}` of a response equal to the ground truth?

The paper's Table 3 was counted with this rule (and with a verifier model, which can only add). It is more lenient than the
reward (`strict.dapo_score`) and still far from algebra: two normal forms forgive spelling (`normal_forms`), tuples are compared
element by element, an integer must be an integer and a fraction must be reduced; only the rest is subtracted and simplified
(`algebra`).

Departure from the reference: model text is never evaluated. The reference hands it to sympy's `parse_expr`, which is `eval`.
Here the text stage runs in this process, in linear time, and decides nearly everything; what needs algebra or a real LaTeX
reader goes to a worker process with a deadline and a memory limit (`pool.GradingPool`; `single` for one response).

On the recorded answers of the reference there is no disagreement. `DIFFERENCES` lists what can differ, and why.

Source: `grade_answer_verl` in the reference's `evals/utils.py`, which is POLARIS' and DeepScaleR's `math_utils` (Apache-2.0);
and `verl/utils/reward_score/math_verify.py` (Apache-2.0).
"""

import re
from collections.abc import Callable
from typing import Any

from justrl_trl.grading.normal_forms import is_tame, is_whole_number, mathd_form, plain_form, without_thousands_commas
from justrl_trl.grading.strict import last_boxed

MAX_ANSWER_CHARS = 4000  # a longer answer is right only if its MATH form is

# (what, truth, answer given, why): right for the reference, or a hang there, and wrong here.
DIFFERENCES = (
    ("operators other than + - * / // **", "sqrt(64)", "1<<3", "not arithmetic"),
    ("attributes of sympy objects", "sqrt(4)", "(2).p", "the way to code execution"),
    ("rare functions of one or two letters", "li(2)", "li(2)+0", "not worth the risk"),
    ("numbers of more than 2^16 bits, factorials above 5000", "2**99999", "2**99999+0", "time and memory"),
    ("towers of powers", "9**9**9**9", "9**9**9**9+0", "time and memory"),
    ("sums of more than about 900 terms", "x", "0+" * 1500 + "x", "the depth of the walk is bounded"),
    ("answers of more than 4000 characters", "x", "0+" * 2500 + "x", "time and memory"),
)

_BOX = "\\boxed"
_BRACKETS = "()[]"
_FRACTION = re.compile(r"-?[0-9]+.?/0*[1-9][0-9]*.?$")
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,999})", re.ASCII)
# sympy may hang on towers and long exponents, so the reference does not try
_HEAVY_POWER = re.compile(r"\^[{(]|\^[0-9]+\^|\^[0-9][0-9]")


def boxed_answer(text: str) -> str | None:
    r"""Content of the last `\boxed`; None if there is none, no brace follows it at once, or the brace never closes."""
    start = text.rfind(_BOX)
    return last_boxed(text[start:]) if start >= 0 and text.startswith("{", start + len(_BOX)) else None


def answer_pair(response: str, ground_truth: Any) -> tuple[str, str] | None:
    """The answer given and the true one, bare; None when either is missing. Numbers are read as their digits."""
    if ground_truth is None or ground_truth == "":
        return None
    truth = str(ground_truth)
    given, truth = boxed_answer(response), boxed_answer(truth) if _BOX in truth else truth
    return None if given is None or truth is None else (given, truth)


def decide_by_text(given: str, truth: str) -> bool | None:
    """Compare two bare answers by their text alone, quickly whatever the text; None when that is not enough."""
    if mathd_form(given) == mathd_form(truth):
        return True
    if not (is_tame(given) and is_tame(truth)):
        return None
    return _compare(given, truth, lambda *_: None)


def decide_by_algebra(given: str, truth: str, equal: Callable[[str, str], bool]) -> bool:
    """Compare two bare answers that `decide_by_text` left open. Only a worker process may call this.

    Args:
        equal: says whether two elements in plain form are algebraically equal (`algebra.equal`).
    """
    return bool(_compare(given, truth, equal))


def _compare(given: str, truth: str, equal: Callable[[str, str], bool | None]) -> bool | None:
    given, truth = plain_form(given), plain_form(truth)
    if given == truth:
        return True
    if not given:
        return False
    given_elements, true_elements = _elements(given), _elements(truth)
    if len(given_elements) != len(true_elements):
        return False
    if len(true_elements) > 1 and (given[0], given[-1]) != (truth[0], truth[-1]):
        return False
    unknown = False
    for element, true_element in zip(given_elements, true_elements, strict=True):
        verdict = _compare_element(element, true_element, equal)
        if verdict is False:
            return False
        unknown |= verdict is None
    return None if unknown else True


def _elements(plain: str) -> list[str]:
    """Elements of a flat tuple or interval, whatever its brackets; anything else is one element."""
    plain = without_thousands_commas(plain)
    if len(plain) > 2 and plain[0] in _BRACKETS and plain[-1] in _BRACKETS:
        inside = plain[1:-1]
        if not any(bracket in inside for bracket in _BRACKETS):
            return [element.strip() for element in inside.split(",")]
    return [plain] if plain else []


def _compare_element(given: str, truth: str, equal: Callable[[str, str], bool | None]) -> bool | None:
    if _FRACTION.match(given) and _FRACTION.match(truth):
        return given == truth  # an unreduced fraction is wrong
    if is_whole_number(given) != is_whole_number(truth):
        return False  # `2^{10}` is no integer yet
    if _INTEGER.fullmatch(given) and _INTEGER.fullmatch(truth):
        return int(given) == int(truth)
    difference = f"({truth})-({given})"
    letters = set(filter(str.isalpha, difference.replace("sqrt", "").replace("frac", "")))
    if len(letters) > 2 or _HEAVY_POWER.search(difference):
        return False  # words, or functions of several variables: the reference does not try either
    return equal(truth, given)
