"""Stock DAPO's rule: the text after the last `Answer:`, compared after Minerva's normalisation. No recipe uses it.

It is here because the recorded answers of the reference cover it (`dapo_score(..., strict_box=False)`). Source: JustRL
`train/verl/utils/reward_score/math_dapo.py` (Apache-2.0); the table is Minerva's (Lewkowycz et al. 2022, arXiv 2206.14858) as
verl spells it. Every pass over a string takes linear time.
"""

import re

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


def last_answer(response: str) -> str:
    """Normal form of what follows the last `Answer:` of a response, or of `NO_ANSWER`."""
    answers = _ANSWER.findall(response[-MINERVA_WINDOW:])
    return normalize_answer(answers[-1] if answers else NO_ANSWER)


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
