"""One grading process: `python -m justrl_trl.grading.worker PARENT DEADLINE MEMORY`.

Algebra on model text can hang, exhaust memory or crash the interpreter, and nothing inside a process prevents that for sure. So
it happens in processes like this one, which `pool` starts and kills. This one limits its own memory (`RLIMIT_AS`) and
recursion, arms a kernel timer before each item that ends it even if its parent cannot (the parent may be gone, and Python may
be stuck in one long multiplication), and ends when its parent has ended. It imports neither torch nor TRL.

Items arrive on standard input, one JSON list `[grader, answer, truth]` per line. Each is answered on standard output by
the line `started`, sent when the imports are done and the clock may run, and a line with a JSON object: `correct`, `error`
(null, or what the grader raised) and `retire` (whether this process has grown and wants to be replaced).
"""

import json
import logging
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from justrl_trl.choices import Grader

RECURSION_LIMIT = 1000  # frames, as in the reference's process: deeper text is no expression
MAX_ERROR_CHARS = 200
_GRACE_SECONDS = 2.0  # the parent's deadline comes first, the kernel's timer is for when it does not


def _rule_grader() -> Callable[[str, str], bool]:
    from justrl_trl.grading.algebra import equal
    from justrl_trl.grading.rule import decide_by_algebra

    equal("x", "2x")  # sympy imports a good part of itself when it first simplifies
    return lambda given, truth: decide_by_algebra(given, truth, equal)


def _math_verify_grader() -> Callable[[str, str], bool]:
    from math_verify.grader import verify
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig, parse

    def grade(response: str, truth: str) -> bool:
        gold = parse("\\boxed{" + truth + "}", (LatexExtractionConfig(),), parsing_timeout=None)
        found = parse(response, (ExprExtractionConfig(), LatexExtractionConfig()), parsing_timeout=None)
        return bool(gold) and verify(gold, found, float_rounding=6, timeout_seconds=None)

    grade("\\boxed{x}", "2x")  # compiles its expressions
    return grade


GRADERS = {Grader.RULE: _rule_grader, Grader.MATH_VERIFY: _math_verify_grader}


def main(parent: int, deadline_seconds: float, memory_mib: int) -> None:
    """Answer items until standard input or the parent ends."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib * 2**20, memory_mib * 2**20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(RECURSION_LIMIT)
    logging.disable(logging.CRITICAL)  # math-verify logs whole responses
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # whatever a library prints must not get between the answers
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    items = os.fdopen(os.dup(0), "rb")
    graders: dict[str, Callable[[str, str], bool]] = {}
    while _wait_for_item(items.fileno(), parent) and (line := items.readline()):
        name, answer, truth = json.loads(line)
        if name not in graders:
            graders[name] = GRADERS[name]()
        print("started", file=answers, flush=True)
        signal.setitimer(signal.ITIMER_REAL, deadline_seconds + _GRACE_SECONDS)
        reply = _grade(graders[name], answer, truth)
        signal.setitimer(signal.ITIMER_REAL, 0)
        # caches grow, and the next item should not fail for want of memory
        reply["retire"] = _resident_mib() * 3 > memory_mib
        print(json.dumps(reply), file=answers, flush=True)


def _wait_for_item(stdin: int, parent: int) -> bool:
    """Wait for input, False when the parent has ended: a process it forked may still hold our input open."""
    while os.getppid() == parent:
        if select.select([stdin], [], [], 1.0)[0]:
            return True
    return False


def _resident_mib() -> float:
    """Memory in use. `ru_maxrss` would be the parent's: the kernel carries its peak over `exec`."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def _grade(grader: Callable[[str, str], bool], answer: str, truth: str) -> dict:
    try:
        return {"correct": bool(grader(answer, truth)), "error": None}
    except Exception as error:  # model text, in a process made for it; the parent counts it and logs the message
        return {"correct": False, "error": f"{type(error).__name__}: {ascii(str(error)[:MAX_ERROR_CHARS])}"}


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
    except BrokenPipeError:
        os._exit(0)  # the parent ended while this was busy; nothing is left to flush
