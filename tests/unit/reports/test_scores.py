"""Known answers, derived in comments, and laws: order does not matter, pass@1 and maj@1 are avg@N, intervals cover."""

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import asdict, replace
from fractions import Fraction

import numpy as np
import pytest

from justrl_trl.reports import scores
from justrl_trl.reports.scores import (
    BenchmarkScore,
    Sample,
    average,
    bootstrap_interval,
    majority_at_k,
    pass_at_k,
    score,
    standard_error,
)


def sample(problem: int, index: int, correct: bool, answer: str | None = "x", **other) -> Sample:
    facts = {"tokens": 100, "truncated": False, "boxed": answer is not None} | other
    return Sample(problem, index, correct, answer=answer, **facts)


def graded(*rows: str) -> list[Sample]:
    """One problem per string, one response per letter: a capital is correct, "-" has no answer."""
    return [
        sample(p, i, letter.isupper(), None if letter == "-" else letter)
        for p, row in enumerate(rows)
        for i, letter in enumerate(row)
    ]


def random_run(rng: random.Random, problems: int, n: int) -> list[Sample]:
    letters = "Abcd-"
    weights = [[rng.random() for _ in letters] for _ in range(problems)]
    return graded(*("".join(rng.choices(letters, w, k=n)) for w in weights))


def flat(s: BenchmarkScore) -> dict:
    """Every number of a score under one key each."""
    return (
        asdict(s)
        | {"pass_at": 0, "maj_at": 0}
        | {("pass", k): v for k, v in s.pass_at.items()}
        | {("maj", k): v for k, v in s.maj_at.items()}
    )


def test_a_small_run_by_hand():
    # Correct per problem: 4, 2, 0 of 4; shares 1, 1/2, 0.
    s = score(graded("AAAA", "AAbb", "bcd-"), 3)
    assert (s.problems, s.samples) == (3, 4)
    assert s.avg == 0.5
    # Unbiased variance of (1, 1/2, 0) is (1/4 + 0 + 1/4) / 2 = 1/4, its root 1/2; over sqrt(3).
    assert s.stderr == pytest.approx(0.5 / math.sqrt(3))
    # pass@2: 1; 1 - C(2,2)/C(4,2) = 5/6; 0. pass@4: 1, 1, 0.
    assert s.pass_at == pytest.approx({1: 1 / 2, 2: (1 + 5 / 6) / 3, 4: 2 / 3})
    # maj@4: 1; a tie of right and wrong, 1/2; 0.
    assert s.maj_at == pytest.approx({1: 1 / 2, 2: 1 / 2, 4: 1 / 2})
    assert s.solve_none == s.solve_all == pytest.approx(1 / 3)
    assert s.no_box == pytest.approx(1 / 12)


def test_lengths_and_shares_are_over_responses():
    run = graded("AA", "bb")
    run = [replace(s, tokens=10 * (i + 1), truncated=i == 3) for i, s in enumerate(run)]
    s = score(run, 2)
    assert (s.mean_tokens, s.truncated, s.no_box) == (25.0, 0.25, 0.0)


def test_powers_of_two_and_n_are_the_values_of_k():
    for n, ks in {1: [1], 2: [1, 2], 4: [1, 2, 4], 6: [1, 2, 4, 6], 32: [1, 2, 4, 8, 16, 32]}.items():
        s = score(graded("A" * n), 1)
        assert list(s.pass_at) == list(s.maj_at) == ks


@pytest.mark.parametrize("n", [1, 4, 7, 32])
def test_pass_at_k_is_the_ratio_of_binomials(n):
    for k in range(1, n + 1):
        for c in range(n + 1):
            exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
            assert pass_at_k(np.array([c]), n, k) == pytest.approx(float(exact), abs=1e-14)


def test_pass_at_k_is_stable_for_many_samples():
    # One right of 10,000: pass@k is the chance that it is among k, k/n. The binomials themselves overflow.
    assert pass_at_k(np.array([1]), 10_000, 5_000) == pytest.approx(0.5)
    assert pass_at_k(np.array([10_000, 0]), 10_000, 5_000) == 0.5


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_outside_the_samples_is_refused(k):
    with pytest.raises(ValueError, match=rf"pass@{k} needs 1 <= k <= 4"):
        pass_at_k(np.array([1]), 4, k)


def test_laws_on_random_runs():
    rng = random.Random(0)
    for n in (1, 2, 3, 8, 32):
        s = score(run := random_run(rng, 20, n), 20)
        assert s.pass_at[1] == pytest.approx(s.avg) and s.maj_at[1] == pytest.approx(s.avg)
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(s.pass_at.values()))
        assert s.pass_at[n] == pytest.approx(1 - s.solve_none)
        assert all(s.maj_at[k] <= s.pass_at[k] + 1e-12 for k in s.maj_at)  # a vote is won only by a drawn answer
        assert s.ci_low <= s.avg <= s.ci_high
        shuffled = rng.sample(run, len(run))
        assert flat(score(shuffled, 20)) == pytest.approx(flat(s), rel=1e-12)


def test_naming_problems_and_samples_otherwise_changes_nothing():
    rng = random.Random(1)
    run = random_run(rng, 12, 8)
    problem, index = rng.sample(range(12), 12), rng.sample(range(100), 8)  # sample numbers need not be 0 .. N - 1
    renamed = [replace(s, problem=problem[s.problem], sample=index[s.sample]) for s in run]
    assert flat(score(renamed, 12)) == pytest.approx(flat(score(run, 12)), rel=1e-12)


def brute_force_vote(row: str, k: int) -> float:
    """The definition: every subset of k, every winner of a tie. Correct share of the winner's class over the whole row."""
    size, right = Counter(row.lower()), Counter(letter.lower() for letter in row if letter.isupper())
    results = []
    for drawn in itertools.combinations(row.lower(), k):
        votes = Counter(letter for letter in drawn if letter != "-") or Counter("-")
        winners = [letter for letter, count in votes.items() if count == max(votes.values())]
        results.append(sum(right[w] / size[w] for w in winners) / len(winners))
    return sum(results) / len(results)


def votes(row: str, *ks: int) -> list[float]:
    answers = [None if letter == "-" else letter.lower() for letter in row]
    return majority_at_k(answers, [letter.isupper() for letter in row], ks)


def test_the_vote_equals_the_vote_over_all_subsets():
    rng = random.Random(2)
    for _ in range(150):
        n = rng.randint(1, 8)
        # Mixed case: one answer graded both ways, as a verifier that reads the whole response may do.
        row = "".join(rng.choice("aAbBcD-") for _ in range(n))
        ks = range(1, n + 1)
        assert votes(row, *ks) == pytest.approx([brute_force_vote(row, k) for k in ks], abs=1e-12)


def test_votes_by_hand():
    assert votes("AAAb", 4) == [1.0]
    assert votes("Abbb", 4) == [0.0]
    assert votes("AAbb", 4) == [0.5]  # tie of two
    assert votes("AAbbcc", 6) == pytest.approx([1 / 3])  # tie of three
    assert votes("A---", 4) == [1.0]  # no answer, no vote: one voice decides
    assert votes("A---", 2) == [0.5]  # A is among 2 of 4 in half of the draws; else nobody votes, which is wrong
    assert votes("----", 4) == [0.0]
    # 3 of AAAbb: AAA and AAb win (1 + 6 draws), Abb loses (3 draws).
    assert votes("AAAbb", 3) == pytest.approx([0.7])
    # Three different answers, one of them right: every draw of 2 is a tie, so maj@2 = maj@1.
    assert votes("Abc", 1, 2, 3) == pytest.approx([1 / 3] * 3)


def test_a_correct_response_without_an_answer_counts_only_when_nobody_votes():
    answers, correct = [None, None, "b"], [True, False, False]
    # k = 1: 1/3, as avg. k = 2: both abstain in one of three draws, worth 1/2; else b wins.
    assert majority_at_k(answers, correct, (1, 2, 3)) == pytest.approx([1 / 3, 1 / 6, 0])


def test_a_vote_among_32_agrees_with_drawn_votes():
    row = "A" * 12 + "b" * 10 + "cde" * 2 + "----"
    rng, expected = random.Random(3), votes(row, 8)[0]
    drawn = [brute_force_vote_of("".join(rng.sample(row, 8))) for _ in range(20_000)]
    # Standard error of 20,000 draws of values in [0, 1] is at most 0.5 / sqrt(20,000) = 0.0035; four of them.
    assert np.mean(drawn) == pytest.approx(expected, abs=0.014)


def brute_force_vote_of(drawn: str) -> float:
    counted = Counter(drawn.replace("-", ""))
    winners = [letter for letter, count in counted.items() if count == max(counted.values())]
    return sum(w.isupper() for w in winners) / max(1, len(winners))


def test_the_bootstrap_has_the_spread_of_the_standard_error_and_is_repeatable():
    count = np.random.default_rng(0).binomial(32, 0.4, size=200)
    low, high = bootstrap_interval(count, 32)
    assert (low, high) == bootstrap_interval(count[::-1], 32)
    # Percentile interval of a near-normal mean: +-1.96 standard errors, within 5 %.
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error(count / 32), rel=0.05)


def test_the_interval_covers_the_truth_in_about_95_of_100_benchmarks(monkeypatch):
    monkeypatch.setattr(scores, "_RESAMPLES", 1_000)
    # Problem difficulty is Beta(1, 1.5), true mean 0.4; 40 problems, 32 responses each, 400 such benchmarks.
    rng = np.random.default_rng(1)
    counts = rng.binomial(32, rng.beta(1, 1.5, size=(400, 40)))
    intervals = [bootstrap_interval(count, 32) for count in counts]
    covered = np.mean([low <= 0.4 <= high for low, high in intervals])
    # Percentile intervals of 40 problems cover a little less than 95 %; four standard errors of 400 trials are 0.044.
    assert 0.90 <= covered <= 0.99
    # An interval that took the 1,280 responses as independent would be far too short.
    naive = [1.96 * math.sqrt((m := c.mean() / 32) * (1 - m) / (40 * 32)) for c in counts]
    assert np.mean([abs(c.mean() / 32 - 0.4) <= half for c, half in zip(counts, naive, strict=True)]) < 0.6


def test_certain_results_have_no_spread():
    for row, value in (("AAAA", 1.0), ("bbbb", 0.0)):
        s = score(graded(row, row), 2)
        assert (s.avg, s.stderr, s.ci_low, s.ci_high) == (value, 0.0, value, value)


def test_one_problem_has_no_error():
    s = score(graded("AAbb"), 1)
    assert (s.avg, s.stderr, s.ci_low, s.ci_high) == (0.5, None, None, None)


def test_the_average_weighs_benchmarks_alike():
    # Shares 3/4 over two problems (1, 1/2) and 0 over three. Errors: sd of (1, 1/2) is sqrt(1/8), over sqrt(2) 1/4; and 0.
    large, small = score(graded("bb", "bb", "bb"), 3), score(graded("AA", "Ab"), 2)
    assert average([large, small]) == (0.375, pytest.approx(math.sqrt(1 / 4**2) / 2))
    assert average([small]) == (small.avg, pytest.approx(small.stderr))
    assert average([small, score(graded("A"), 1)])[1] is None
    with pytest.raises(ValueError, match="no benchmark to average"):
        average([])


def test_results_are_plain_numbers_for_json():
    s = asdict(score(graded("AAb-", "bbbb"), 2))
    assert json.loads(json.dumps(s))["maj_at"]["4"] == 0.5


INCOMPLETE = {
    "a problem with fewer": (graded("AA", "A"), 2, r"problem 1 has 1 responses and others have 2 \(1 of 2 problems"),
    "a problem with none": (graded("AA", "AA"), 3, r"problem 2 has 0 responses"),
    "nothing": ([], 2, r"problem 0 has 0 responses"),
    "no problems": ([], 0, r"nothing to score"),
    "a duplicate": ([*graded("A", "b"), sample(1, 0, True)], 2, r"problem 1 has sample 0 twice"),
    "another benchmark's problem": (graded("A", "b", "b"), 2, r"problem 2 is outside 0 .. 1"),
    "a negative index": ([sample(-1, 0, True)], 1, r"problem -1 is outside"),
}


@pytest.mark.parametrize(("run", "problems", "message"), INCOMPLETE.values(), ids=INCOMPLETE.keys())
def test_an_incomplete_run_is_refused(run, problems, message):
    with pytest.raises(ValueError, match=message):
        score(run, problems)
