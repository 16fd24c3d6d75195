"""Scores of graded responses: avg@N with errors, pass@k, maj@k, lengths.

All scores and shares are fractions in [0, 1]; tables print percent. The unit of evidence is the problem: N responses to one
problem are not N independent trials, so errors are taken over problem means. They say how far the score would move with
other problems of the same kind; the randomness of N samples is contained in it.

avg@N is the mean over problems of the share of correct responses, JustRL's `mean_score`. pass@k is the unbiased estimate of
Chen et al. 2021 (arXiv 2107.03374). maj@k is the expected result of a vote among k of the N responses, computed exactly over
all subsets and over all ways to break a tie, where published code draws some. A problem's maj@k and pass@k for k < N are
thus averages over the same N responses, and maj@1 = pass@1 = avg@N.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_RESAMPLES = 10_000
_CONFIDENCE = 0.95
_SEED = 0


@dataclass(frozen=True)
class Sample:
    """One graded response."""

    problem: int  # 0 .. problems - 1
    sample: int  # which of the N responses to this problem
    correct: bool
    tokens: int  # length of the response
    truncated: bool  # stopped by the length limit
    boxed: bool  # whether "boxed" appears at all
    answer: str | None  # normalised final answer, equal text = same vote; None without one


@dataclass(frozen=True)
class BenchmarkScore:
    """A model on one benchmark; fractions, not percent."""

    problems: int
    samples: int  # N, the same for every problem
    avg: float  # avg@N
    stderr: float | None  # of avg, clustered by problem; None for one problem
    ci_low: float | None  # 95 % bootstrap interval of avg over problems; None for one problem
    ci_high: float | None
    pass_at: dict[int, float]  # k = 1, 2, 4, ... and N
    maj_at: dict[int, float]  # the same k
    mean_tokens: float  # tokens per response
    truncated: float  # share of responses
    no_box: float  # share of responses
    solve_none: float  # share of problems without a correct response
    solve_all: float  # share of problems with only correct responses


def score(samples: list[Sample], problems: int) -> BenchmarkScore:
    """All numbers of one benchmark.

    Args:
        samples: every response of every problem, in any order.
        problems: P, the number of problems sampled, indexed 0 .. P - 1.

    Raises:
        ValueError: a problem without responses or with another number of them, a duplicate, or an index outside. Unequal
            counts are refused, not averaged away: they mean an unfinished run, whose easy problems finished first.
    """
    table = _by_problem(samples, problems)
    correct = np.array([[s.correct for s in row] for row in table], dtype=bool)  # (P, N)
    count = correct.sum(axis=1)  # (P,) correct responses per problem
    n = correct.shape[1]
    ks = sorted({n, *(1 << i for i in range(n.bit_length()))})  # powers of two up to N, and N
    low, high = bootstrap_interval(count, n)
    responses = [s for row in table for s in row]
    return BenchmarkScore(
        problems=problems,
        samples=n,
        avg=float(correct.mean()),
        stderr=standard_error(count / n),
        ci_low=low,
        ci_high=high,
        pass_at={k: pass_at_k(count, n, k) for k in ks},
        maj_at=dict(zip(ks, np.mean([_vote(row, tuple(ks)) for row in table], axis=0).tolist(), strict=True)),
        mean_tokens=float(np.mean([s.tokens for s in responses])),
        truncated=float(np.mean([s.truncated for s in responses])),
        no_box=float(np.mean([not s.boxed for s in responses])),
        solve_none=float((count == 0).mean()),
        solve_all=float((count == n).mean()),
    )


def average(scores: Iterable[BenchmarkScore]) -> tuple[float, float | None]:
    """Plain mean of the benchmarks' avg@N, as the paper's last column, and its standard error.

    Every benchmark weighs the same, whatever its size. The benchmarks are independent: the error is sqrt(sum of squares) / B,
    or None where one of them has none.
    """
    scores = list(scores)
    if not scores:
        raise ValueError("no benchmark to average over: score at least one.")
    errors = [s.stderr for s in scores]
    error = None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(scores)
    return sum(s.avg for s in scores) / len(scores), error


def standard_error(means: np.ndarray) -> float | None:
    """Standard error of the mean of `means`, (P,): unbiased sd / sqrt(P); None for one problem."""
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None


def bootstrap_interval(count: np.ndarray, n: int) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile interval of avg@N over 10,000 redrawn sets of problems; None for one problem.

    Args:
        count: correct responses per problem, (P,), each 0 .. n.

    Problems with the same count are interchangeable, so a redrawn set is one multinomial draw over the counts 0 .. n. That
    makes it independent of the problems' order, and (resamples, n + 1) numbers hold it instead of (resamples, P).
    """
    problems = len(count)
    if problems < 2:
        return None, None
    share = np.bincount(count, minlength=n + 1) / problems  # (n + 1,)
    drawn = np.random.default_rng(_SEED).multinomial(problems, share, size=_RESAMPLES)  # (resamples, n + 1)
    means = drawn @ np.arange(n + 1) / (n * problems)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def pass_at_k(count: np.ndarray, n: int, k: int) -> float:
    """Mean over problems of 1 - C(n-c, k) / C(n, k), as the product of (1 - k/i) for i = n-c+1 .. n (Chen et al. 2021).

    Args:
        count: c, correct responses per problem, (P,), of `n` each.
        k: 1 .. n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= {n} responses per problem: sample more, or ask for a smaller k.")
    # With fewer than k wrong ones (n-c < k) the product holds i = k, a zero; before it come negative factors that may overflow.
    by_count = [1.0 if n - c < k else 1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)) for c in range(n + 1)]
    return float(np.mean(np.array(by_count)[count]))


def majority_at_k(answers: list[str | None], correct: list[bool], ks: Iterable[int]) -> list[float]:
    """Expected result of a vote among k responses drawn without replacement from the N to one problem.

    Equal answers form a class, and the largest class drawn wins. A tie is broken at random: the tied classes share the
    result. A response without an answer abstains; only when all k abstain, they are the winner. A win is worth the share of
    the class that was graded correct, over all N responses: 0 or 1, except where the grader read more than the answer.

    Args:
        answers, correct: (N,) each.
        ks: values of k, each 1 .. N.

    Returns:
        One expected result in [0, 1] per k. `k = N` is the vote itself, `k = 1` the share of correct responses. Exact to
        float precision for N up to about 1,000; beyond, C(N, k) overflows (OverflowError).
    """
    size, right = Counter(answers), Counter(answer for answer, ok in zip(answers, correct, strict=True) if ok)
    abstain = (size.pop(None, 0), right.pop(None, 0))
    return list(_expected_vote(tuple(sorted((size[a], right[a]) for a in size)), abstain, tuple(ks)))


def _vote(row: list[Sample], ks: tuple[int, ...]) -> list[float]:
    return majority_at_k([s.answer for s in row], [s.correct for s in row], ks)


@lru_cache(maxsize=4096)  # problems with the same classes are frequent: all right, all wrong
def _expected_vote(classes: tuple[tuple[int, int], ...], abstain: tuple[int, int], ks: tuple[int, ...]) -> tuple[float, ...]:
    """`majority_at_k` from (size, correct) of each answer class and of the abstentions.

    For every winning count t, `ways[d, w]` counts the subsets of d voters in which no class has more than t and exactly w
    classes have t; `worth[d, w]` adds up the worth of those w classes over the same subsets. All terms are positive, so
    nothing cancels.
    """
    n = abstain[0] + sum(size for size, _ in classes)
    total = np.zeros(n + 1)  # by number drawn: sum over subsets of the vote's result
    for t in range(1, max((size for size, _ in classes), default=0) + 1):
        most = sum(size >= t for size, _ in classes)
        ways, worth = np.zeros((n + 1, most + 1)), np.zeros((n + 1, most + 1))
        ways[0, 0] = 1
        for size, right in classes:
            old_ways, old_worth = ways, worth
            ways, worth = np.zeros_like(ways), np.zeros_like(worth)
            for u in range(min(size, t) + 1):  # u members of this class are drawn
                c, upto = float(math.comb(size, u)), n + 1 - u
                at, before = (slice(1, None), slice(None, -1)) if u == t else (slice(None), slice(None))
                ways[u:, at] += c * old_ways[:upto, before]
                worth[u:, at] += c * old_worth[:upto, before]
                if u == t:
                    worth[u:, at] += c * right / size * old_ways[:upto, before]
        won = (worth[:, 1:] / np.arange(1, most + 1)).sum(axis=1)  # (n + 1,) by voters drawn; w tied classes share
        for u in range(abstain[0] + 1):
            total[u:] += math.comb(abstain[0], u) * won[: n + 1 - u]
    if abstain[0]:
        total += [math.comb(abstain[0], k) * abstain[1] / abstain[0] for k in range(n + 1)]
    return tuple(float(total[k] / math.comb(n, k)) for k in ks)


def _by_problem(samples: list[Sample], problems: int) -> list[list[Sample]]:
    """(P, N) samples, checked."""
    if problems < 1:
        raise ValueError(f"{problems} problems: there is nothing to score. Sample at least one problem.")
    table: list[dict[int, Sample]] = [{} for _ in range(problems)]
    for s in samples:
        if not 0 <= s.problem < problems:
            raise ValueError(f"problem {s.problem} is outside 0 .. {problems - 1}: score the responses of one benchmark only.")
        if s.sample in table[s.problem]:
            raise ValueError(f"problem {s.problem} has sample {s.sample} twice: remove one of the two from the stored samples.")
        table[s.problem][s.sample] = s
    most = max(map(len, table))
    short = [index for index, row in enumerate(table) if len(row) < most or not row]
    if short:
        raise ValueError(
            f"problem {short[0]} has {len(table[short[0]])} responses and others have {most} ({len(short)} of {problems} "
            "problems have fewer): an average would favour problems that finished early. Run the evaluation again to sample "
            "the rest."
        )
    return [list(row.values()) for row in table]
