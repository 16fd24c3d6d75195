r"""Grade one response at a time, with a worker process that this process starts when it first needs one and keeps.

    grade_answer(r"... so \boxed{\frac{2}{4}}", r"\frac{1}{2}")   # False: not reduced

To grade many responses, use a `GradingPool`.
"""

import atexit
import os
import threading
from typing import Any

from justrl_trl.choices import Grader
from justrl_trl.grading.pool import GradingPool

_shared: GradingPool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> GradingPool:
    """The pool of one worker behind `grade_answer` and `math_verify_answer`; each process has its own, closed at exit."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = GradingPool(workers=1)
            atexit.register(_shared.close)
        return _shared


def _forget_shared_pool() -> None:
    """In a forked child: its parent's workers answer to the parent."""
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_shared_pool)


def grade_answer(response: str, ground_truth: Any) -> bool:
    r"""Whether the last `\boxed{...}` of a response is the ground truth, by the rule grader of the reference.

    Safe on any model text: nothing is evaluated, and what the text stage leaves open runs in a worker process with a memory
    limit that is killed after a few seconds , which makes the answer wrong.

    Args:
        response: decoded response; any `str`, NUL and lone surrogates included.
        ground_truth: bare or inside a `\boxed{...}`; None and "" are no answer, so every response is wrong.

    Raises:
        RuntimeError: when no worker process can be started.
    """
    return shared_pool().grade([(response, ground_truth)], Grader.RULE)[0].correct


def math_verify_answer(response: str, ground_truth: str) -> bool:
    r"""Whether math-verify finds the ground truth in a response, as the reference's validation during training does.

    The truth is read as LaTeX inside a `\boxed{}`, the response as a plain expression or LaTeX, and numbers are compared to 6
    decimals. Always runs in a worker process: one deadline for all of it takes the place of math-verify's own timeouts, which
    need the main thread and a signal. A response that meets the deadline is wrong; the reference gave up stage by stage.

    Raises:
        RuntimeError: when no worker process can be started.
    """
    return shared_pool().grade([(response, ground_truth)], Grader.MATH_VERIFY)[0].correct
