"""The rule grader equals the reference's recorded verdicts on every row, and never evaluates what a model wrote.

Vectors were recorded by running the reference's `grade_answer_verl`: a part is committed beside this file (every kind of
rewrite, with both verdicts) and always runs; the larger set runs when it lies beside the checkout.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sympy

from justrl_trl.grading.algebra import MAX_FACTORIAL, equal, to_sympy
from justrl_trl.grading.normal_forms import is_tame, mathd_form, plain_form, without_thousands_commas
from justrl_trl.grading.rule import DIFFERENCES, answer_pair, boxed_answer, decide_by_algebra, decide_by_text
from justrl_trl.grading.single import grade_answer
from justrl_trl.grading.strict import dapo_score
from tests.unit.hostile import ANSWERS, CANARY, RESPONSES, fuzz

FOLDERS = {
    "committed": Path(__file__).parents[1] / "vectors",
    "recorded": Path(__file__).resolve().parents[4] / "shared" / "vectors",
}


def read_rows(which: str) -> list[dict]:
    path = FOLDERS[which] / "eval_grader.jsonl"
    if not path.exists():
        pytest.skip(f"the full recorded set {path.name} does not lie beside this checkout")
    with path.open(encoding="utf-8", errors="surrogatepass") as lines:
        rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["expected"] is not None]  # None: the reference itself did not finish


@pytest.mark.parametrize("which", FOLDERS)
def test_verdicts_equal_the_reference_on_every_row(which):
    rows = read_rows(which)
    wrong = [row for row in rows if grade_answer(row["response"], row["ground_truth"]) != row["expected"]]
    shown = [(row["id"], row["tag"], row["response"][-80:], row["ground_truth"]) for row in wrong[:5]]
    assert rows and not wrong, f"{len(wrong)} of {len(rows)} rows: {shown}"


# The committed part has up to three rows of each kind that needs algebra, the full set has them as they come.
@pytest.mark.parametrize(("which", "share"), [("committed", 1 / 4), ("recorded", 1 / 10)])
def test_few_rows_need_more_than_their_text(which, share):
    pairs = [answer_pair(row["response"], row["ground_truth"]) for row in read_rows(which)]
    undecided = [pair for pair in pairs if pair is not None and decide_by_text(*pair) is None]
    assert 0 < len(undecided) < share * len(pairs)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}}", "\\frac{1}{2}"),
        ("\\boxed{1} and \\boxed{2", None),  # an unclosed last box hides the earlier one
        ("\\boxed{1} and \\boxed 2", None),  # so does one without braces
        ("\\boxed{1} and \\boxedx{2}", None),
        ("\\fbox{1}", None),
        ("\\boxed{}", ""),
        ("1", None),
    ],
)
def test_the_last_box_counts_and_needs_its_braces(text, content):
    assert boxed_answer(text) == content


@pytest.mark.parametrize("truth", [None, "", "\\boxed{5", "\\boxed 5"])
def test_without_a_true_answer_every_response_is_wrong(truth):
    assert not grade_answer("\\boxed{5}", truth) and not grade_answer("\\boxed{}", truth)


def test_the_truth_may_be_boxed_or_a_number():
    assert grade_answer("so \\boxed{204}", "\\boxed{204}") and grade_answer("so \\boxed{0}", 0)
    assert not grade_answer("204", "204")  # the response has no box


@pytest.mark.parametrize(
    ("raw", "form"),
    [
        ("\\dfrac12", "\\frac{1}{2}"),
        ("\\tfrac1{72}", "\\frac{1}{72}"),
        ("\\frac{72}1", "\\frac{72}1"),  # the second argument is not repaired
        ("1/2", "\\frac{1}{2}"),
        ("-1/2", "\\frac{-1}{2}"),
        ("01/2", "01/2"),  # no integer as Python writes it
        ("1/2/3", "1/2/3"),
        ("0.5", "\\frac{1}{2}"),
        ("{.5}", "{0.5}"),
        (".25", "0.25"),
        ("x = 3", "3"),
        ("ans=3", "ans=3"),  # more than two characters before the sign
        ("a=b=3", "a=b=3"),
        ("\\sqrt3+\\sqrt{2}", "\\sqrt{3}+\\sqrt{2}"),
        ("90^\\circ", "90"),
        ("5\\text{ cm}", "5"),
        ("5\\text{ cm}\\text{ cm}", "5\\text{ cm}\\text{ cm}"),
        ("\\text{ (A) }", "(A)"),
        ("\\left(1,2\\right)", "(1,2)"),
        ("20\\%", "20"),
        ("a \\frac", "a \\frac"),  # unfinished: left as it came, blanks included
        ("\\sqrt", "\\sqrt"),
        ("", ""),
    ],
)
def test_mathd_form(raw, form):
    assert mathd_form(raw) == form


@pytest.mark.parametrize(
    ("raw", "form"),
    [
        ("7 \\frac{3}{4}", "7+3/4"),
        ("3\\frac{1}{2}\\text{ cm}", "3+1/2"),
        ("1,000", "1000"),
        ("1e3", "1000"),
        ("5.0", "5"),
        ("2.99999999", "3"),  # within 1e-7 of an integer: rounded here,
        ("1,002.99999999", "1002"),  # and cut where a thousands comma hid the number at first
        ("- 3", "-3"),
        ("x or y", "x,y"),
        ("5 million", "5*10^6"),
        ("60 degrees", "60"),
        ("5 cm^2", "5"),
        ("\\sqrt{2}\\cdot\\pi", "sqrt(2)*pi"),
        ("{1,2}", "1,2"),
        ("\\infty", "inf"),
        ("\\text{Yes}", "yes"),
        ("nan", "nan"),
        ("1e999999999", "1e999999999"),
    ],
)
def test_plain_form(raw, form):
    assert plain_form(raw) == form


def test_thousands_commas_keep_the_reference_quirk_from_the_third_on():
    assert without_thousands_commas("1,234") == "1234"
    assert without_thousands_commas("1,234,567") == "1234567"
    assert without_thousands_commas("1,234,567,890") == "1234,567890"
    assert without_thousands_commas("1,23") == "1,23"


@pytest.mark.parametrize(
    ("given", "truth", "verdict"),
    [
        ("2/4", "1/2", False),  # unreduced
        ("1024", "2^{10}", False),  # one is written as an integer, one is not
        ("(1,2)", "[1,2]", False),  # brackets of a tuple count
        ("(1,2,3)", "(1,2)", False),
        ("(1,\\frac{2}{4})", "(1,\\frac{1}{2})", False),
        ("588", "70", False),
        ("-0", "0", True),
        ("yes", "Yes", True),
        ("no", "yes", False),
        ("x+y+z", "z+y+x", False),  # three letters: the reference does not try
        ("2^{x}", "2^{y}", None),  # braces go before the powers are judged, so this is open
        ("2^10+x", "x+1024", False),  # a long exponent: neither
        ("x+1", "1+x", None),
        ("(1,x+1)", "(1,1+x)", None),
        ("(2,x+1)", "(1,1+x)", False),  # one wrong element decides
        ("\\begin{pmatrix}1\\end{pmatrix}", "x", None),  # a matrix is read in a worker only
    ],
)
def test_text_decides_what_needs_no_algebra(given, truth, verdict):
    assert decide_by_text(given, truth) is verdict


@pytest.mark.parametrize(
    ("truth", "given", "same"),
    [
        ("x+1", "1+x", True),
        ("2(x+1)", "2x+2", True),
        ("sqrt(8)", "2sqrt(2)", True),
        ("sqrt8", "2sqrt(2)", False),  # s*q*r*t*8: four letters, to sympy
        ("x2", "2x", True),
        ("0.2[1]", "19/90", True),  # repeating decimals: 0.2111...
        ("ln(4)", "2ln(2)", True),
        ("f(x)", "f(x)", True),
        ("4!", "24", True),
        ("7//2", "3", True),
        ("07", "7", False),  # not a number to Python
        ("x07", "7x", False),
        ("(x", "x", False),
        ("x=1", "x=1", False),
        ("", "", False),
    ],
)
def test_algebra_reads_what_sympy_reads(truth, given, same):
    assert equal(truth, given) is same


def test_algebra_knows_its_bounds():
    assert to_sympy("2**30000") == sympy.Integer(2) ** 30000
    assert to_sympy(f"{MAX_FACTORIAL}!") == sympy.factorial(MAX_FACTORIAL)
    for text in ("2**70000", "(2x)**70000", "2**(10**9/3)", "1e99999", "1e-99999", f"{MAX_FACTORIAL + 1}!", "(9!)!"):
        with pytest.raises(ValueError, match="is not computed"):
            to_sympy(text)
    for text in ("(2).p", "1<<3", "ln('2')", "sqrt(x, evaluate=0)", "[x]", "li(2)", "2 if x else 3", "{}", "x is x", "ln"):
        with pytest.raises((ValueError, SyntaxError)):
            to_sympy(text)


@pytest.mark.parametrize(("what", "truth", "given", "why"), DIFFERENCES, ids=[row[0] for row in DIFFERENCES])
def test_differences_from_the_reference_are_always_to_the_stricter_side(what, truth, given, why):
    assert not grade_answer(f"\\boxed{{{given}}}", truth)


# The audit event `exec` fires whenever Python runs a code object through eval or exec. Imports run module code, so the hook
# counts from the second round on. parse_expr, what the reference calls, is the proof that the hook sees an evaluation.
_AUDIT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
sys.path.insert(0, {root!r})
from sympy.parsing.sympy_parser import parse_expr
from justrl_trl.grading.algebra import to_sympy
from tests.unit.hostile import ANSWERS, fuzz
seen = []
sys.addaudithook(lambda event, _: seen.append(event) if event in ("exec", "os.system", "open", "subprocess.Popen") else None)
def run(read, texts):
    del seen[:]
    for text in texts:
        try:
            read(text)
        except Exception:
            pass
    return len(seen)
texts = [text for text in ANSWERS.values() if len(text) < 500] + [text for pair in fuzz(1, 300) for text in pair]
run(to_sympy, texts)
print(run(to_sympy, texts), run(parse_expr, ["1+1"]))
"""


def test_no_code_object_is_ever_run_from_model_text():
    root = str(Path(__file__).resolve().parents[3])
    command = [sys.executable, "-W", "ignore", "-c", _AUDIT.format(root=root)]
    ours, parse_expr = map(int, subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split())
    assert ours == 0 and parse_expr > 0


@pytest.mark.parametrize("name", ANSWERS)
def test_the_text_stage_takes_no_time_and_never_raises_on_either_side(name):
    started = time.perf_counter()
    for given, truth in ((ANSWERS[name], "x/2"), ("x/2", ANSWERS[name])):
        pair = answer_pair(f"\\boxed{{{given}}}", truth)
        assert pair is None or decide_by_text(*pair) in (False, None)
    # 1 s leaves room for a busy machine: it takes under 0.03 s here
    assert time.perf_counter() - started < 1.0


def test_the_latex_reader_meets_only_tame_text_in_this_process():
    assert is_tame("\\frac{1}{2}+\\sqrt{3}") and not is_tame("\\begin{pmatrix}1\\end{pmatrix}")
    # the output of nested matrices grows threefold with each level: 27 kB at 8 levels, 400 MB at 17
    assert not is_tame(ANSWERS["nested matrices, short"]) and not is_tame(ANSWERS["3,000 nested braces"])


def test_hostile_responses_cost_the_strict_verifier_less_than_a_millisecond():
    texts = [(text * (65_536 // max(len(text), 1) + 1))[-65_536:] for text in (*RESPONSES.values(), *ANSWERS.values())]
    seconds = []
    for text in texts * 8:
        started = time.perf_counter()
        score = dapo_score(text, "x/2")
        seconds.append(time.perf_counter() - started)
        assert score.score == -1.0
    assert sorted(seconds)[int(len(seconds) * 0.99)] < 1e-3


def test_fuzz_pairs_are_decided_alike_in_every_round():
    verdicts = [[decide_by_text(*pair) for pair in fuzz(2, 2000)] for _ in range(2)]
    assert verdicts[0] == verdicts[1] and {True, False, None} == set(verdicts[0])


def test_algebra_decides_what_the_text_left_open():
    assert decide_by_algebra("(1,x+1)", "(1,1+x)", equal) and not decide_by_algebra("(1,x+1)", "(1,2+x)", equal)
    assert not CANARY.exists()
