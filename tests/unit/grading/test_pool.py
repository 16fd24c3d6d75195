"""A hang, a crash or a memory bomb in model text costs one item and never the caller; real worker processes throughout."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from math_verify.metric import math_metric
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

from justrl_trl.grading import single
from justrl_trl.grading.pool import GradingPool, Verdict
from justrl_trl.grading.rule import MAX_ANSWER_CHARS
from justrl_trl.grading.single import grade_answer, math_verify_answer, shared_pool
from justrl_trl.grading.strict import dapo_score
from tests.unit.hostile import ANSWERS, CANARY, RESPONSES, fuzz

ROOT = Path(__file__).resolve().parents[3]
EASY = ("\\boxed{1+x}", "x+1")  # needs algebra, and is right
WRONG = ("\\boxed{2+x}", "x+1")
HANG = ("the answer is $9^{9^{9^9}}$", "5")  # for math-verify
DEADLINE = 1.0  # seconds; an easy item takes 0.01


@pytest.fixture(scope="module")
def pool():
    with GradingPool(workers=2, deadline_seconds=DEADLINE) as pool:
        yield pool


def wait_until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_verdicts_come_in_the_order_of_the_items_whoever_graded_them(pool):
    items = [(f"\\boxed{{{k}+x}}", f"x+{k if k % 3 else k + 1}") for k in range(40)]
    seen = []
    verdicts = pool.grade(items, on_done=lambda index, verdict: seen.append((index, verdict)))
    assert [verdict.correct for verdict in verdicts] == [bool(k % 3) for k in range(40)]
    assert sorted(seen, key=lambda pair: pair[0]) == list(enumerate(verdicts))
    assert len(pool._running) == 2 and len({worker.process.pid for worker in pool._running}) == 2


def test_items_decided_by_text_start_no_process():
    with GradingPool() as pool:
        items = [
            ("\\boxed{5}", "5"),
            ("\\boxed{588}", "70"),
            ("no box", "5"),
            ("\\boxed{\\frac12}", "1/2"),
            ("\\boxed{5}", None),
        ]
        assert [verdict.correct for verdict in pool.grade(items)] == [True, False, False, True, False]
        assert pool._running == []


def test_equal_items_are_graded_once():
    with GradingPool(workers=4) as pool:
        assert pool.grade([EASY, WRONG, EASY] * 50) == [Verdict(True), Verdict(False), Verdict(True)] * 50
        assert pool.grade([EASY] * 50) == [Verdict(True)] * 50
        assert len(pool._running) == 2  # for two kinds of items, two workers


def test_a_hang_ends_at_the_deadline_and_the_next_item_is_graded(pool):
    before = pool.counts()["timeouts"]
    started = time.monotonic()
    verdicts = pool.grade([HANG, ("the answer is \\boxed{5}", "5")] * 2 + [("\\boxed{6}", "5")], "math_verify")
    assert verdicts == [Verdict(False, "timeout"), Verdict(True)] * 2 + [Verdict(False)]
    assert pool.counts()["timeouts"] == before + 2  # graded once, counted per item
    assert time.monotonic() - started < DEADLINE + 20  # room for a busy machine to start a worker


def test_items_above_the_caps_are_wrong_and_counted():
    with GradingPool(max_chars=100) as pool:
        long = "x+" * MAX_ANSWER_CHARS + "x"
        assert pool.grade([(f"\\boxed{{{long}}}", "x+1")]) == [Verdict(False, "too_long")]
        assert pool.grade([(f"\\boxed{{{long}}}", long)]) == [Verdict(True)]  # its text decides
        assert pool.grade([("\\boxed{5}" + " " * 100, "5")], "math_verify") == [Verdict(False, "too_long")]
        assert pool.counts() == {"timeouts": 0, "too_long": 2, "crashed": 0} and pool._running == []


def test_a_worker_that_dies_costs_its_item_only():
    with GradingPool(deadline_seconds=60) as pool:

        def kill():
            wait_until(lambda: any(worker.started for worker in pool._running))
            pool._running[0].process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        verdicts = pool.grade([HANG, ("\\boxed{5}", "5")], "math_verify")
        killer.join()
        assert verdicts == [Verdict(False, "crashed"), Verdict(True)] and pool.counts()["crashed"] == 1


def test_a_worker_that_dies_between_items_costs_nothing(pool):
    assert pool.grade([EASY])[0].correct
    for worker in pool._running:
        worker.process.kill()
        worker.process.wait()
    crashed = pool.counts()["crashed"]
    assert pool.grade([EASY, WRONG]) == [Verdict(True), Verdict(False)] and pool.counts()["crashed"] == crashed


def test_memory_of_a_worker_is_bounded_and_its_bomb_harmless():
    # nested matrices grow threefold per level in the LaTeX reader: 18 levels would take about 1 GB
    bomb = ("\\boxed{" + "\\begin{pmatrix}1&2\\\\" * 18 + "}", "x")
    with GradingPool(memory_mib=256, deadline_seconds=30) as pool:
        assert pool.grade([bomb, EASY])[1] == Verdict(True)
        limits = [psutil.Process(worker.process.pid).rlimit(psutil.RLIMIT_AS) for worker in pool._running]
        assert limits == [(256 * 2**20, 256 * 2**20)]
        assert not pool.grade([bomb])[0].correct


def test_a_grown_worker_is_replaced():
    with GradingPool(memory_mib=128) as pool:  # a third of it is less than sympy itself
        assert pool.grade([EASY]) == [Verdict(True)]
        first = pool._running[0].process.pid
        assert pool.grade([WRONG]) == [Verdict(False)]
        assert pool._running[0].process.pid != first and pool.counts()["crashed"] == 0


def test_an_exception_in_the_middle_leaves_no_stale_verdict(pool):
    def fail(index, verdict):
        raise KeyError(index)

    right, wrong = ("\\boxed{5}", "5"), ("\\boxed{6}", "5")
    with pytest.raises(KeyError):
        pool.grade([right, HANG], "math_verify", on_done=fail)  # the first verdict comes while the second item hangs
    assert pool.grade([wrong, right], "math_verify") == [Verdict(False), Verdict(True)]


def test_threads_may_share_a_pool_and_need_not_be_the_main_one(pool):
    results = {}

    def grade(name, items, grader):
        results[name] = [verdict.correct for verdict in pool.grade(items, grader)]

    jobs = [("rule", [EASY, WRONG] * 5, "rule"), ("math", [("\\boxed{5}", "5"), ("\\boxed{6}", "5")] * 5, "math_verify")]
    threads = [threading.Thread(target=grade, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"rule": [True, False] * 5, "math": [True, False] * 5}


def test_logs_of_hostile_text_are_short_and_plain(pool, caplog):
    pool.grade([("\u202e" * 50_000 + HANG[0] + "\ud800" * 5_000, "5")], "math_verify")
    assert caplog.messages and all(len(message) < 250 and message.isascii() for message in caplog.messages)


_PARENT = """
import sys, time
from justrl_trl.grading.pool import GradingPool
pool = GradingPool(workers=2, deadline_seconds=1.0)
pool.grade([("\\\\boxed{1+x}", "x+1"), ("\\\\boxed{2+x}", "x+1")])
print(*(worker.process.pid for worker in pool._running), flush=True)
if sys.argv[1] == "busy":
    pool.grade([("$9^{9^{9^9}}$", "5"), ("$8^{9^{9^9}}$", "5")], "math_verify")
time.sleep(60)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_workers_end_with_a_parent_that_is_killed(state):
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, state], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        pids = list(map(int, parent.stdout.readline().split()))
        time.sleep(0.5)
    finally:
        parent.kill()
        parent.wait()
    assert len(pids) == 2
    # idle: at once, busy: at the deadline of 1 s and the grace of 2 s
    assert wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_workers_survive_ctrl_c_of_their_caller(pool):
    pool.grade([EASY, WRONG])
    assert all(os.getpgid(worker.process.pid) != os.getpgid(0) for worker in pool._running)


def test_workers_are_light_and_the_grader_leaves_sympy_to_them():
    code = "import sys, json, justrl_trl.grading.pool{}; print(json.dumps(sorted(sys.modules)))"
    heavy = {"torch", "trl", "transformers", "vllm", "numpy", "deepspeed"}

    def modules(extra):
        command = [sys.executable, "-c", code.format(extra)]
        return set(json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout))

    assert not modules("") & {*heavy, "sympy", "math_verify"}
    worker = modules(", justrl_trl.grading.worker, justrl_trl.grading.algebra, math_verify.grader, math_verify.parser")
    assert not worker & heavy and "sympy" in worker


def test_a_fork_neither_uses_nor_ends_the_workers_of_its_parent(pool):
    assert grade_answer(*EASY) and pool.grade([EASY])[0].correct
    child = os.fork()
    if child == 0:
        try:
            pool.grade([EASY])
        except RuntimeError:
            pool.close()
            os._exit(7 if grade_answer(*EASY) else 1)  # by a shared pool of its own
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    pids = [worker.process.pid for worker in (*pool._running, *shared_pool()._running)]
    assert pool.grade([EASY])[0].correct and grade_answer(*EASY)
    assert pids == [worker.process.pid for worker in (*pool._running, *shared_pool()._running)]


def test_a_worker_that_cannot_start_is_an_error_of_the_installation(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with GradingPool() as pool, pytest.raises(RuntimeError, match="3 grading workers in a row.*memory_mib=512"):
        pool.grade([EASY])


def test_a_pool_says_what_is_wrong_with_its_use():
    for wrong in (
        {"workers": 0},
        {"deadline_seconds": 0},
        {"deadline_seconds": float("nan")},
        {"max_chars": 0},
        {"memory_mib": 64},
    ):
        with pytest.raises(ValueError, match="The defaults suit"):
            GradingPool(**wrong)
    pool = GradingPool()
    with pytest.raises(ValueError, match="grader='sympy' is unknown"):
        pool.grade([EASY], "sympy")
    pool.close()
    with pytest.raises(RuntimeError, match="was closed.*Make a new GradingPool"):
        pool.grade([EASY])


def test_math_verify_in_a_worker_is_what_the_reference_calls():
    reference = math_metric(
        gold_extraction_target=(LatexExtractionConfig(),),
        pred_extraction_target=(ExprExtractionConfig(), LatexExtractionConfig()),
    )
    rows = map(json.loads, (Path(__file__).parents[1] / "vectors" / "eval_grader.jsonl").open(encoding="utf-8"))
    items = [
        (row["response"], row["ground_truth"]) for row in rows if row["ground_truth"] and "boxed" not in row["ground_truth"]
    ]
    items = items[::4]
    expected = []
    for response, truth in items:
        try:
            expected.append(reference(["\\boxed{" + truth + "}"], [response])[0] == 1.0)
        except Exception:  # the reference gives 0 for whatever the library raises
            expected.append(False)
    with GradingPool(deadline_seconds=60) as pool:  # the reference allows 5 seconds for each of several stages
        assert [verdict.correct for verdict in pool.grade(items, "math_verify")] == expected
    assert 20 < sum(expected) < len(items) - 20
    assert math_verify_answer("so $x = 0.5$", "\\frac{1}{2}") and not math_verify_answer("so $x = 0.6$", "\\frac{1}{2}")


def test_hostile_text_never_stops_a_grader():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    boxed = [f"\\boxed{{{answer}}}" for answer in ANSWERS.values()]
    random = [(f"\\boxed{{{given}}}", truth) for given, truth in fuzz(3, 300)]
    with GradingPool(workers=2, deadline_seconds=0.2) as pool:
        for grader, responses, pairs in (("rule", boxed, random), ("math_verify", RESPONSES.values(), random[:60])):
            started, lost = time.monotonic(), sum(pool.counts().values())
            verdicts = pool.grade([*((response, "x/2") for response in responses), *pairs], grader)
            lost = sum(pool.counts().values()) - lost
            assert {verdict.outcome for verdict in verdicts} <= {"graded", "timeout", "too_long", "crashed"}
            assert not any(verdict.correct for verdict in verdicts[: len(responses)])
            # a lost item costs at most a deadline and a new worker, the rest is milliseconds; with room for a busy machine
            assert time.monotonic() - started < 30 + lost * 3
        pool.grade([("\\boxed{x/2}", answer) for answer in ANSWERS.values()])
    assert not any(dapo_score(response, "x/2").score == 1.0 for response in (*boxed, *RESPONSES.values()))
    assert not CANARY.exists()
    # KiB; the caller holds texts of at most 100 kB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_a_single_call_is_as_safe_as_a_pool(monkeypatch):
    with GradingPool(deadline_seconds=DEADLINE) as quick:
        monkeypatch.setattr(single, "_shared", quick)
        assert not math_verify_answer(*HANG) and quick.timeouts == 1
        assert grade_answer(*EASY) and not grade_answer("\\boxed{" + ANSWERS["nested matrices"] + "}", "x")


def test_the_shared_pool_is_one_per_process_and_made_when_needed():
    assert shared_pool() is shared_pool() and shared_pool().workers == 1


def test_signal_handlers_of_the_caller_stay(pool):
    handler = signal.getsignal(signal.SIGALRM)
    pool.grade([("\\boxed{5}", "5")], "math_verify")
    assert signal.getsignal(signal.SIGALRM) == handler
