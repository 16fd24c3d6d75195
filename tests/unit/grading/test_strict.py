"""The reward equals the reference's recorded answers, on every row, and no model text can make it raise or stall.

Vectors were recorded by running JustRL's own verifier: a small set is committed beside this file (at least one row of
every kind) and always runs; the larger set runs when it lies beside the checkout.
"""

import json
import time
from pathlib import Path

import pytest

from justrl_trl.grading.minerva import normalize_answer
from justrl_trl.grading.strict import DapoScore, dapo_reward, dapo_score, last_boxed, overlong_penalty

COMMITTED = Path(__file__).parents[1] / "vectors"
RECORDED = Path(__file__).resolve().parents[4] / "shared" / "vectors"


def read_rows(path: Path) -> list[dict]:
    if not path.exists():
        pytest.skip(f"the full recorded set {path.name} does not lie beside this checkout")
    with path.open(encoding="utf-8", errors="surrogatepass") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("folder", [COMMITTED, RECORDED], ids=["committed", "recorded"])
def test_score_and_prediction_equal_the_reference_on_every_row(folder):
    disagreements = []
    rows = read_rows(folder / "dapo_reward.jsonl")
    for row in rows:
        got = dapo_score(row["response"], row["ground_truth"], strict_box=row["strict_box_verify"])
        if got != DapoScore(row["score"], row["pred"]):
            disagreements.append((row["id"], row["tag"], got, row["score"], row["pred"]))
    assert rows and not disagreements, f"{len(disagreements)} of {len(rows)} rows: {disagreements[:5]}"


@pytest.mark.parametrize("folder", [COMMITTED, RECORDED], ids=["committed", "recorded"])
def test_overlong_penalty_equals_the_reference_on_every_row(folder):
    for row in read_rows(folder / "overlong_penalty.jsonl"):
        lengths = (row["response_length"], row["max_resp_len"], row["buffer_len"])
        # The reference computes in float32, hence 1e-6 and not equality.
        assert overlong_penalty(*lengths, row["penalty_factor"]) == pytest.approx(row["penalty"], abs=1e-6), row["id"]


@pytest.mark.parametrize(
    "written", ["x=5", " 5 ", "05", "5.0", "\\text{5}", "5.", "$5$", "+5", "\\boxed {5}", "5\u200b", "five"]
)
def test_strict_rule_pays_only_the_exact_characters(written):
    assert dapo_score(f"so \\boxed{{{written}}}", "5").score == -1.0
    assert dapo_score(f"so \\boxed{{{written}}}", written).score == 1.0


@pytest.mark.parametrize(
    ("response", "prediction"),
    [
        ("\\boxed{5}}", "5"),  # a stray brace after the box changes nothing
        ("\\boxed{\\boxed{5}}", "5"),  # the last opening counts, so the inner box wins
        ("\\boxed{5} then \\boxed{6}", "6"),
        ("\\boxed{5} then \\boxed{6", None),  # an unclosed last box hides the earlier one
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\{1}", None),  # escaped braces count too
        ("\\boxed{}", ""),
        ("\\fbox{5}", None),
        ("\\boxed {5}", None),
        ("Answer: 5", None),
        ("", None),
    ],
)
def test_strict_rule_reads_the_last_closed_box(response, prediction):
    assert dapo_score(response, "5") == DapoScore(1.0 if prediction == "5" else -1.0, prediction)


def test_whole_box_must_fit_in_the_last_100_characters():
    box = "\\boxed{5}"
    assert dapo_score(box + "." * (100 - len(box)), "5").score == 1.0
    assert dapo_score(box + "." * (101 - len(box)), "5") == DapoScore(-1.0, None)


@pytest.mark.parametrize("truth", [5, 5.0, True, None, ["5"]])
def test_truth_that_is_not_text_never_equals_a_box(truth):
    assert dapo_score("\\boxed{5}", truth) == DapoScore(-1.0, "5")
    assert dapo_score("Answer: 5", truth, strict_box=False) == DapoScore(-1.0, "5")


def test_no_box_equals_a_truth_of_none_as_in_the_reference():
    assert dapo_score("no box", None) == DapoScore(1.0, None)


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("x = 1{,}234 \\text{ meters}", "1234"),
        ("2=3=4", "4"),
        ("the price is $\\frac12$ or $3$", "\\frac{1}{2}"),  # the first formula of a line is the answer
        ("\\sqrt2 \\text{cm}", "\\sqrt{2}"),
        ("30^\\circ", "30"),
        ("1,000", "1000"),
        ("(1,000)", "(1,000)"),  # commas go only from plain integers
        ("\\textbf{7}", "7"),
        ("\\boxed{\\overline{AB}}", "AB"),  # the shortest unwrap eats the first brace; the greedy box takes the rest
        ("\\text{open", "\\text{open"),
        ("always", "al"),  # "ways" is cut inside words too
        ("$5.$", "5"),
        ("an integer a 5", "integer5"),
        ("\\$5", "5"),
        ("x,\\text{and}y", "x,y"),
        ("x \\mbox{and} y", "x,y"),  # mbox becomes text first
        ("3,\\text{and}4", "34"),  # and then looks like one integer with a comma
        ("1\\ 000", "1000"),
        ("1,²", "1²"),  # any Unicode digit makes a plain integer
        ("", ""),
    ],
)
def test_minerva_normal_form(raw, normal):
    assert normalize_answer(raw) == normal


@pytest.mark.parametrize(
    "filler",
    "square ways integers dollars mph inches hours km units \\ldots sue points feet minutes digits cents degrees cm "
    "gm pounds meters meals edges students childrentickets multiples \\text{s} \\text{.} \\text{m} \\text{m}^2 "
    '\\text{m}^3 \\text{} \\mathrm{th} ^\\circ ^{\\circ} \\; ,\\! {,} " \\dots'.split(),
)
def test_minerva_filler_is_cut_from_both_sides_of_the_comparison(filler):
    assert normalize_answer(f"7{filler}8") == "78"


def test_minerva_rule_takes_the_last_answer_line_and_the_first_answer_on_it():
    assert dapo_score("Answer: 4\nanswer : 5", "5", strict_box=False).score == 1.0
    assert dapo_score("Answer: 5 Answer: 6", "5", strict_box=False).prediction == "5Answer:6"
    assert dapo_score("nothing", "5", strict_box=False) == DapoScore(-1.0, "[INVALID]")
    assert dapo_score("Answer: 5" + "." * 300, "5", strict_box=False) == DapoScore(-1.0, "[INVALID]")


HOSTILE = {
    "empty": "",
    "NUL": "\x00" * 1000 + "\\boxed{\x00}",
    "lone surrogates": "\ud800\udfff" * 1000 + "Answer: \udc00 \\boxed{\ud800",
    "100 kB line": "x" * 100_000,
    "3,000 nested braces": "\\boxed{" + "{" * 3000 + "}" * 3000 + "}",
    "3,000 open braces": "\\boxed{" + "{" * 3000,
    "3,000 close braces": "}" * 3000,
    "20,000 open boxes": "\\boxed{" * 20_000,
    "20,000 open texts": "Answer: " + "\\text{" * 20_000,
    "100 kB of blanks": "Answer:" + " \t" * 50_000,
    "100 kB of blank lines": "Answer:" + "\n" * 100_000,
    "100 kB of dollars": "Answer: " + "$" * 100_000,
    "20,000 answers": "Answer:" * 20_000,
    "power tower": "\\boxed{" + "9^{" * 30 + "9" + "}" * 30 + "}",
    "factorials": "\\boxed{24!\\times24!}",
    "python": "\\boxed{__import__('os').system('true')}",
    "bidi and combining": "\u202e\u0301" * 5000 + "\\boxed{\u0661}",
}


@pytest.mark.parametrize("strict_box", [True, False])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_costs_no_time_and_never_raises_on_either_side(text, strict_box):
    started = time.perf_counter()
    as_response = dapo_score(text, "5", strict_box)
    as_truth = dapo_score("Answer: \\boxed{5}", text, strict_box)
    elapsed = time.perf_counter() - started
    assert as_response.score == as_truth.score == -1.0
    # 1 s leaves room for a busy machine: linear passes take under 0.1 s here, quadratic ones many seconds.
    assert elapsed < 1.0, f"{elapsed:.3f} seconds: the rule is no longer linear"


def test_last_boxed_needs_no_window():
    assert last_boxed("\\boxed{" + "{" * 3000 + "}" * 3000 + "}") == "{" * 3000 + "}" * 3000


def test_reward_function_reads_plain_and_conversational_completions_alike():
    texts = ["\\boxed{5}", "\\boxed{6}", ""]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    extra = {"prompts": ["p"] * 3, "completion_ids": [[1]] * 3, "row": [0, 0, 0], "trainer_state": None}
    assert dapo_reward(completions=texts, solution=["5"] * 3, **extra) == [1.0, -1.0, -1.0]
    assert dapo_reward(completions=chats, solution=["5"] * 3, **extra) == [1.0, -1.0, -1.0]


def test_reward_function_gives_an_empty_message_minus_one():
    assert dapo_reward([[{"role": "assistant", "content": None}], [{"role": "assistant"}]], ["5", "5"]) == [-1.0, -1.0]


def test_reward_function_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match=r"2 completions but 1 solutions"):
        dapo_reward(["a", "b"], ["5"])
    with pytest.raises(ValueError, match=r"completions \[1\] \(1 in all\).*load_problems"):
        dapo_reward(["a", "b"], ["5", None])
    for completion in (None, [], 5, [{"role": "assistant", "content": [{"type": "image"}]}]):
        with pytest.raises(TypeError, match="neither text nor a list of chat messages"):
            dapo_reward([completion], ["5"])


def test_overlong_penalty_is_zero_to_the_ramp_and_has_no_floor():
    assert overlong_penalty(11264, 15360, 4096) == 0.0  # 15360 - 4096
    assert overlong_penalty(11265, 15360, 4096) == pytest.approx(-1 / 4096)
    assert overlong_penalty(15360, 15360, 4096) == -1.0
    assert overlong_penalty(19456, 15360, 4096, penalty_factor=0.5) == -1.0  # one more buffer, twice the factor


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((10, 100, 0, 1.0), "buffer_length=0"),
        ((10, 100, -1, 1.0), "buffer_length=-1"),
        ((10, 100, 101, 1.0), "max_response_length=100"),
        ((10, 0, 0, 1.0), "max_response_length=0"),
        ((10, 100, 10, -0.5), "penalty_factor=-0.5"),
        ((10, 100, 10, float("nan")), "penalty_factor=nan"),
        ((-1, 100, 10, 1.0), "response_length=-1"),
    ],
)
def test_overlong_penalty_names_a_value_that_makes_no_ramp(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        overlong_penalty(*arguments)
