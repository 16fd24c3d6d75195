r"""Responses per second of the graders: the strict verifier against verl's rules and math-verify, and the pool of processes.

    python tests/benchmarks/grading.py            # two cores are enough, under a minute

All sides grade the same texts (2 to 20 kB of made-up reasoning, seeded; most end in a `\boxed{}`, some in `Answer:`, some in
nothing) in alternation in one run; figures are medians over the repetitions. math-verify runs as verl calls it, in this process
with its own timeouts, and in a `GradingPool` of one and of two workers. verl's rules are restated here in plain form: the text
after `Answer:` with Minerva's normalisation (what stock verl and DAPO train with), and the boxed rule of the reference's fork.
The last line is one JSON object.
"""

import argparse
import json
import logging
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from math_verify.metric import math_metric  # noqa: E402
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig  # noqa: E402

from justrl_trl.grading.minerva import normalize_answer  # noqa: E402
from justrl_trl.grading.pool import GradingPool  # noqa: E402
from justrl_trl.grading.strict import dapo_score  # noqa: E402
from tests.unit.hostile import ANSWERS, RESPONSES  # noqa: E402

PASSES = 200  # over all texts in one measurement of the fast sides, which take microseconds
KIB_64 = 65_536

SENTENCES = (
    "Let $x_{a}$ be the number of ways to choose {a} of {b} points, so $x_{a} = \\binom{{{b}}}{{{a}}}$. ",
    "Wait, I should check the case $n = {a}$ again, since ${a} + {b} = {c}$ and not ${c}{a}$. ",
    "By the quadratic formula, $$t = \\frac{{-{a} \\pm \\sqrt{{{b}^2 - 4 \\cdot {c}}}}}{{2}}.$$\n\n",
    "Therefore the remainder of $ {a}^{{{b}}} $ divided by {c} follows from Euler's theorem.\n",
    "Hmm, let me think about the triangle with sides {a}, {b} and {c} once more. ",
    "So far we have \\[ f({a}) = \\frac{{{b}}}{{{c}}} \\quad\\text{{and}}\\quad f({b}) = {a}. \\]\n",
)


def responses(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` pairs of response and ground truth; half of the answers given are right."""
    generator = random.Random(seed)
    items = []
    for _ in range(count):
        length, parts = generator.randint(2_000, 20_000), []
        while sum(map(len, parts)) < length:
            a, b, c = (generator.randint(2, 99) for _ in range(3))
            parts.append(generator.choice(SENTENCES).format(a=a, b=b, c=c))
        a, b = generator.randint(1, 999), generator.randint(2, 99)
        truth = generator.choice([str(a), f"\\frac{{{a}}}{{{b}}}", f"{a}\\sqrt{{{b}}}", f"({a}, {b})"])
        given = truth if generator.random() < 0.5 else str(a + b)
        kind = generator.random()
        if kind < 0.8:
            parts.append(f"**Final answer**\n\\[ \\boxed{{{given}}} \\]")
        elif kind < 0.9:
            parts.append(f"Answer: {given}")
        items.append(("".join(parts), truth))
    return items


def verl_minerva(response: str, truth: str) -> dict:
    """Stock verl's `math_dapo`: the last 300 characters, every `Answer:` in them, both sides in Minerva's normal form.

    The normalisation is this package's, which makes the same replacements in the same order.
    """
    found = re.findall(r"(?i)Answer\s*:\s*([^\n]+)", response[-300:])
    prediction = normalize_answer(found[-1] if found else "[INVALID]")
    correct = prediction == normalize_answer(truth)
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": prediction}


def verl_boxed(response: str, truth: str) -> dict:
    """The fork's boxed rule: 300, then 100 characters, the last box, its braces counted, its content compared."""
    tail = response[-300:][-100:]
    start = tail.rfind("\\boxed{")
    depth, content = 0, None
    for position in range(start, len(tail)) if start >= 0 else ():
        if tail[position] == "{":
            depth += 1
        if tail[position] == "}":
            depth -= 1
            if depth == 0:
                content = tail[start : position + 1][len("\\boxed{") : -1]
                break
    return {"score": 1.0 if content == truth else -1.0, "acc": content == truth, "pred": content}


def math_verify_side() -> Callable[[str, str], float]:
    """math-verify as verl calls it, in this process, with its alarms."""
    metric = math_metric(
        gold_extraction_target=(LatexExtractionConfig(),),
        pred_extraction_target=(ExprExtractionConfig(), LatexExtractionConfig()),
    )

    def grade(response: str, truth: str) -> float:
        try:
            return metric(["\\boxed{" + truth + "}"], [response])[0]
        except Exception:  # as verl: whatever the library raises on model text is a 0
            return 0.0

    return grade


def per_second(grade: Callable[[str, str], object], items: list[tuple[str, str]], passes: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(passes):
        for response, truth in items:
            grade(response, truth)
    return passes * len(items) / (time.perf_counter() - started)


def pool_per_second(pool: GradingPool, items: list[tuple[str, str]], grader: str) -> float:
    started = time.perf_counter()
    pool.grade(items, grader)
    return len(items) / (time.perf_counter() - started)


def strict_p99_ms(items: list[tuple[str, str]], repeats: int = 20) -> float:
    """99th percentile over realistic and hostile responses of 64 KiB, in milliseconds."""
    texts = [response for response, _ in items] + [
        *RESPONSES.values(),
        *(f"\\boxed{{{answer}}}" for answer in ANSWERS.values()),
    ]
    texts = [(text * (KIB_64 // max(len(text), 1) + 1))[-KIB_64:] for text in texts]
    seconds = []
    for text in texts * repeats:
        started = time.perf_counter()
        dapo_score(text, "204")
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[int(len(seconds) * 0.99)] * 1e3


def measure(items: list[tuple[str, str]], repetitions: int) -> dict[str, float]:
    """Medians of responses per second, by side, all sides once per repetition."""
    # equal texts are graded once, and each repetition asks the pools for fresh ones: nothing comes from a cache
    fresh = [[(f"({repetition}) {text}", truth) for text, truth in items] for repetition in range(repetitions)]
    math_verify = math_verify_side()
    rates: dict[str, list[float]] = {}
    with GradingPool(workers=1) as one, GradingPool(workers=2) as two:
        for pool in (one, two):
            pool.grade([("\\boxed{1}", "2"), ("\\boxed{2}", "1")], "math_verify")  # starts the workers
        math_verify("\\boxed{1}", "2")
        for repetition in range(repetitions):
            sides = {
                "strict": lambda: per_second(dapo_score, items, PASSES),
                "verl_minerva": lambda: per_second(verl_minerva, items, PASSES // 10),
                "verl_boxed": lambda: per_second(verl_boxed, items, PASSES),
                "math_verify": lambda texts=fresh[repetition]: per_second(math_verify, texts),
                "pool_1": lambda texts=fresh[repetition]: pool_per_second(one, texts, "math_verify"),
                "pool_2": lambda texts=fresh[repetition]: pool_per_second(two, texts, "math_verify"),
                "rule": lambda texts=fresh[repetition]: pool_per_second(two, texts, "rule"),
            }
            for name, side in sides.items():
                rates.setdefault(name, []).append(side())
        if sum((one.counts() | two.counts()).values()):
            print(f"not graded: {one.counts()} with one worker, {two.counts()} with two")
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=400, help="texts graded by every side in each repetition")
    parser.add_argument("--repetitions", type=int, default=5, help="alternations of all sides; medians are reported")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # math-verify logs whole responses
    items = responses(arguments.responses)
    for response, truth in items:  # the restated boxed rule is the same rule
        assert verl_boxed(response, truth)["score"] == dapo_score(response, truth).score
        assert verl_minerva(response, truth)["score"] == dapo_score(response, truth, strict_box=False).score
    rates = measure(items, arguments.repetitions)
    labels = {
        "strict": "strict verifier (the reward)",
        "verl_minerva": "verl's rule: `Answer:` and Minerva (stock verl)",
        "verl_boxed": "verl's rule: boxed (the reference's fork)",
        "math_verify": "math-verify, this process, own timeouts",
        "pool_1": "math-verify, GradingPool, 1 worker",
        "pool_2": "math-verify, GradingPool, 2 workers",
        "rule": "rule grader, GradingPool, 2 workers",
    }
    mean = statistics.mean(len(response) for response, _ in items)
    print(f"{len(items)} responses of {mean:,.0f} characters on average, medians of {arguments.repetitions}")
    for name, label in labels.items():
        print(f"{label:<50} {rates[name]:>12,.0f} responses/s   strict is {rates['strict'] / rates[name]:,.2f} x")
    p99 = strict_p99_ms(items)
    print(f"strict verifier, 64 KiB responses, hostile ones included: p99 {p99:.4f} ms")
    print(f"pool, 2 workers against 1: {rates['pool_2'] / rates['pool_1']:.2f} x")
    result = {
        "strict_per_second": round(rates["strict"]),
        "verl_ratio": round(rates["strict"] / rates["verl_minerva"], 2),
        "verl_boxed_ratio": round(rates["strict"] / rates["verl_boxed"], 2),
        "math_verify_ratio": round(rates["strict"] / rates["math_verify"], 1),
        "strict_p99_ms_64kb": round(p99, 4),
        "rule_per_second": round(rates["rule"]),
        "math_verify_per_second": round(rates["math_verify"]),
        "pool_1_per_second": round(rates["pool_1"]),
        "pool_2_per_second": round(rates["pool_2"]),
        "pool_scaling": round(rates["pool_2"] / rates["pool_1"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
