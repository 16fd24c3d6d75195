r"""The two normal forms of a final answer in the rule grader.

`mathd_form` is the normalisation of the MATH data set (Hendrycks et al. 2021, arXiv 2103.03874): two answers are equal when
their LaTeX is, up to spelling. `plain_form` turns LaTeX into a line of calculator text that algebra can read. Both keep the
oddities of the reference on purpose, because a published score was counted with them: `x=5` loses its `x=` but `ans=5` does
not, `2,000,000,000` keeps one comma, `2.99999999` becomes `2`.

Nothing is evaluated. Every pass takes linear time except the LaTeX reader (pylatexenc), whose output grows exponentially with
nested matrices and whose depth follows the text: `is_tame` says which text it may read in this process.

Source: the reference's `evals/utils.py`, which is POLARIS' and DeepScaleR's `math_utils` (Apache-2.0); the first form is there
after Hendrycks' `math_equivalence` (MIT), the second after PRM800K's grader (MIT).
"""

import logging
import re

from pylatexenc.latex2text import LatexNodes2Text

# it warns for each macro of model text that it cannot fill in
logging.getLogger("pylatexenc").setLevel(logging.CRITICAL)

TAME_CHARS, TAME_OPENERS = 1000, 80  # the longest answer of the nine benchmarks has fewer than 200 characters

_TEXT_BOX = re.compile(r"\\text\{(.+?)\}$")
# Applied in this order, each to the whole string.
_MATHD_REWRITES = (
    ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""),
    ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""),
)  # fmt: skip
_UNIT = "\\text{ "  # a text box that begins with a blank holds a unit
_WHOLE_FRACTION = re.compile(r"(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)")

_PLAIN_REWRITES = (
    ("\\%", "%"), ("\\$", "$"), ("$", ""), ("%", ""), (" or ", " , "), (" and ", " , "),
    ("million", "*10^6"), ("billion", "*10^9"), ("trillion", "*10^12"),
)  # fmt: skip
# In this order, and inside words too: `centimeter` has lost its `meter` when its turn would come.
_UNITS = "degree cm centimeter meter mile second minute hour day week month year foot feet inch yard".split()
_UNIT_PATTERNS = [re.compile(unit + r"(es)?(s)? *(\^[0-9]+)?") for unit in _UNITS] + [re.compile(r"\^ *\\circ")]
_THIN_COMMA = re.compile(r",\\! *")
_MIXED_NUMBER = re.compile(r"([0-9]) +([0-9])")  # 7 3/4 -> 7+3/4
# What pylatexenc writes, and what algebra reads.
_SIGNS = (("√", "sqrt"), ("π", "pi"), ("∞", "inf"), ("∪", "U"), ("·", "*"), ("×", "*"))
# The digit after the group is taken along, so of two neighbouring commas the second waits for the next pass, and by then it
# may no longer have exactly three digits behind it.
_THOUSANDS = re.compile(r"(\d),(\d\d\d)($|\D)")


class _Malformed(ValueError):
    """The text breaks off where a rewrite needs more of it."""


def unwrap_text(answer: str) -> str:
    r"""The inside of an answer that is one `\text{...}`; other answers as they are."""
    match = _TEXT_BOX.match(answer)
    return answer if match is None else match[1]


def mathd_form(answer: str) -> str:
    r"""Normal form of the MATH data set: `\dfrac12`, `1/2`, `x = \frac{1}{2}` and `0.5` are all `\frac{1}{2}`.

    Text that a rewrite cannot finish (a closing `\frac`, two units) is left as it came, without surrounding blanks.
    """
    answer = unwrap_text(answer.strip()).strip()
    try:
        return _mathd_rewrite(answer)
    except _Malformed:
        return answer


def _mathd_rewrite(answer: str) -> str:
    for before, after in _MATHD_REWRITES:
        answer = answer.replace(before, after)
    answer, *units = answer.split(_UNIT)
    if len(units) > 1:
        raise _Malformed
    answer = answer.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if answer.startswith("."):
        answer = "0" + answer
    name, *values = answer.split("=")
    if len(values) == 1 and len(name) <= 2:  # `x=5` and `x =5`, but also `=5`
        answer = values[0]
    answer = _brace_roots(answer).replace(" ", "")
    answer = _brace_fractions(answer)
    if answer == "0.5":
        return "\\frac{1}{2}"
    fraction = _WHOLE_FRACTION.fullmatch(answer)
    return f"\\frac{{{fraction[1]}}}{{{fraction[2]}}}" if fraction else answer


def _brace_roots(answer: str) -> str:
    r"""`\sqrt2` -> `\sqrt{2}`."""
    head, *tails = answer.split("\\sqrt")
    if not all(tails):
        raise _Malformed
    return "\\sqrt".join([head, *(tail if tail[0] == "{" else f"{{{tail[0]}}}{tail[1:]}" for tail in tails)])


def _brace_fractions(answer: str) -> str:
    r"""`\frac12` -> `\frac{1}{2}`, `\frac1{72}` -> `\frac{1}{72}`; with a single character behind any `\frac`, no change."""
    head, *tails = answer.split("\\frac")
    braced = [head]
    for tail in tails:
        if not tail:
            raise _Malformed
        if tail[0] == "{":
            braced.append(tail)
        elif len(tail) == 1:
            return answer
        elif tail[1] == "{":
            braced.append(f"{{{tail[0]}}}{tail[1:]}")
        else:
            braced.append(f"{{{tail[0]}}}{{{tail[1]}}}{tail[2:]}")
    return "\\frac".join(braced)


def is_tame(answer: str) -> bool:
    """Whether `plain_form` surely takes little time, memory and depth: short, few commands and braces, no matrix."""
    openers = sum(map(answer.count, "\\{["))
    return len(answer) <= TAME_CHARS and openers <= TAME_OPENERS and "\\begin" not in answer


def plain_form(answer: str) -> str:
    r"""Calculator text of an answer, in lower case, without blanks, units or braces: `3 \frac{1}{2}\text{ cm}` -> `3+1/2`.

    A whole number in any spelling that `float` knows (`1,000`, `5.0`, `1e3`) becomes its digits. Text that the LaTeX reader
    refuses goes on as LaTeX.
    """
    answer = unwrap_text(answer)
    for before, after in _PLAIN_REWRITES:
        answer = answer.replace(before, after)
    for pattern in _UNIT_PATTERNS:
        answer = pattern.sub("", answer)
    if answer.startswith("{") and answer.endswith("}"):
        answer = answer[1:-1]
    answer = _THIN_COMMA.sub("", answer)
    value = _near_integer(answer)
    if value is not None:
        answer = str(round(value))
    if "\\" in answer:
        answer = _latex_to_plain(answer)
    answer = re.sub("- *", "-", answer)
    answer = _MIXED_NUMBER.sub(r"\1+\2", answer).replace(" ", "").replace("{", "").replace("}", "").lower()
    value = _near_integer(without_thousands_commas(answer))
    return answer if value is None else str(int(value))  # int() cuts, round() above does not: both as in the reference


def _latex_to_plain(answer: str) -> str:
    latex = answer.replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac").replace("\\frac", " \\frac")  # for 3\frac12
    try:
        text = LatexNodes2Text().latex_to_text(latex)
    except Exception:  # a parser of others on model text, which raises at least six classes; the reference goes on likewise
        return answer
    for sign, word in _SIGNS:
        text = text.replace(sign, word)
    return text.strip()


def without_thousands_commas(text: str) -> str:
    """`1,234` -> `1234`; commas that do not stand before exactly three digits stay, since they may separate elements."""
    while (shorter := _THOUSANDS.sub(r"\1\2\3", text)) != text:
        text = shorter
    return text


def is_whole_number(text: str) -> bool:
    """Whether `text` is a number within 1e-7 of an integer, thousands commas allowed."""
    return _near_integer(without_thousands_commas(text)) is not None


def _near_integer(text: str) -> float | None:
    try:
        value = float(text)
        return value if abs(value - round(value)) <= 1e-7 else None
    except (ValueError, OverflowError):  # no number; nan and infinity have no nearest integer
        return None
