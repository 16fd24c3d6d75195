"""Grade in processes that can be killed: a hang, a crash or too much memory costs one item.

Libraries that simplify model text hang in spite of their own timeouts, leak memory, and can take the interpreter down. So it
never happens in the calling process: each worker (`worker`) is a fresh interpreter, not a fork of a process with
threads and CUDA, with a memory limit. An item that is not done after `deadline_seconds` is wrong, its worker is killed and a
new one takes over. What was lost is counted (`GradingPool.counts`) and logged in short; nothing of it is fatal.

One thread drives all workers through pipes: the caller's, inside `grade`. Most answers of the rule grader are decided by their
text and never leave it, and equal items are graded once, so workers start only when something is left for them. They end with
their parent, however it ends.

    with GradingPool(workers=8) as pool:
        verdicts = pool.grade([(response, truth), ...], "math_verify")
    print(pool.counts())
"""

import json
import logging
import os
import selectors
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from justrl_trl.choices import Grader
from justrl_trl.grading.process import WorkerProcess
from justrl_trl.grading.rule import MAX_ANSWER_CHARS, answer_pair, decide_by_text

logger = logging.getLogger(__name__)

_STARTS = 3  # attempts before a worker that never gets ready is an error of the installation
_LOGGED_CHARS = 80


@dataclass(frozen=True)
class Verdict:
    """Verdict of a grader on one item."""

    correct: bool
    outcome: str = "graded"  # or "timeout", "too_long", "crashed": then the item was not graded and counts as wrong


class GradingPool:
    """A pool of grading processes; see the module's docstring. Use it as a context manager, or `close` it.

    Args:
        workers: processes at most; each starts when there is work for it. One per core is enough.
        deadline_seconds: per item, counted from the moment its worker is ready.
        max_chars: of a response that math-verify reads; a longer one is wrong. 200,000 is about 50,000 tokens. The rule grader
            reads the answer only, of at most `rule.MAX_ANSWER_CHARS`.
        memory_mib: address space of one worker in MiB; sympy and math-verify need about 70.
    """

    def __init__(self, workers: int = 1, deadline_seconds: float = 5.0, max_chars: int = 200_000, memory_mib: int = 512):
        if workers < 1 or max_chars < 1 or memory_mib < 128 or not 0 < deadline_seconds < 86_400:
            raise ValueError(
                f"workers={workers}, deadline_seconds={deadline_seconds}, max_chars={max_chars}, memory_mib={memory_mib}: a "
                "pool needs at least one worker, one character and 128 MiB (the libraries alone take 70), and a deadline "
                "between 0 seconds and a day. The defaults suit math answers."
            )
        self.workers, self.deadline_seconds, self.max_chars, self.memory_mib = workers, deadline_seconds, max_chars, memory_mib
        self.timeouts = self.too_long = self.crashed = 0  # items so far
        self._running: list[WorkerProcess] = []
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> "GradingPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers; the counters stay readable."""
        self._closed = True
        while self._running and self._owner == os.getpid():  # a forked copy has no workers of its own
            self._running.pop().stop()

    def counts(self) -> dict[str, int]:
        """Items so far that were not graded, by reason: a metric."""
        return {"timeouts": self.timeouts, "too_long": self.too_long, "crashed": self.crashed}

    def grade(
        self,
        items: Iterable[tuple[str, Any]],
        grader: str = Grader.RULE,
        on_done: Callable[[int, Verdict], None] | None = None,
    ) -> list[Verdict]:
        """Grade `(response, ground truth)` pairs; verdicts in the order of the items.

        Args:
            grader: a `Grader`.
            on_done: called in this thread with index and verdict as each item is done, in any order.

        Raises:
            ValueError: for an unknown grader.
            RuntimeError: for a pool that is closed or belongs to another process, or when workers cannot be started.
        """
        if grader not in list(Grader):
            raise ValueError(f"grader={grader!r} is unknown: choose one of {', '.join(Grader)}.")
        if self._closed or self._owner != os.getpid():
            raise RuntimeError(
                f"this pool was {'closed' if self._closed else f'made in process {self._owner}, before a fork'}: its workers "
                "cannot be used here. Make a new GradingPool."
            )
        items = list(items)
        verdicts: list[Verdict | None] = [None] * len(items)

        def done(index: int, verdict: Verdict) -> None:
            verdicts[index] = verdict
            if on_done is not None:
                on_done(index, verdict)

        work: dict[bytes, list[int]] = {}  # what a worker has to read -> items; answers of one problem are often the same
        for index, (response, truth) in enumerate(items):
            task = self._text_stage(response, truth) if grader == Grader.RULE else self._whole_response(response, truth)
            if isinstance(task, Verdict):
                done(index, task)
            else:
                work.setdefault(json.dumps([grader, *task]).encode("ascii") + b"\n", []).append(index)
        if work:
            with self._lock:
                try:
                    for message, verdict in self._run(work):
                        for index in work[message]:
                            done(index, verdict)
                finally:  # an exception leaves items half done, whose answers must not meet the next call
                    for worker in [worker for worker in self._running if worker.message is not None]:
                        self._stop_worker(worker)
        return verdicts

    def _text_stage(self, response: str, truth: Any) -> Verdict | tuple[str, str]:
        pair = answer_pair(response, truth)
        correct = False if pair is None else decide_by_text(*pair)
        if correct is not None:
            return Verdict(correct)
        return self._too_long() if max(map(len, pair)) > MAX_ANSWER_CHARS else pair

    def _whole_response(self, response: str, truth: Any) -> Verdict | tuple[str, str]:
        truth = "" if truth is None else str(truth)
        return self._too_long() if max(len(response), len(truth)) > self.max_chars else (response, truth)

    def _too_long(self) -> Verdict:
        self.too_long += 1
        return Verdict(False, "too_long")

    def _run(self, work: dict[bytes, list[int]]) -> Iterator[tuple[bytes, Verdict]]:
        """Hand the work out, one message per worker at a time; yields each with its verdict until all is done."""
        waiting = list(reversed(work))
        unready = 0  # workers in a row that ended before they were ready
        while len(self._running) < min(self.workers, len(work)):
            self._start_worker()
        while waiting or any(worker.message is not None for worker in self._running):
            for worker in self._running:
                if worker.message is None and waiting:
                    worker.assign(waiting.pop())
            for worker, reply in self._events():
                message, worker.message = worker.message, None
                if reply is None or reply["retire"]:
                    self._stop_worker(worker)
                    self._start_worker()
                if reply is None and not worker.started:
                    unready += 1
                    self._give_up_after(unready)
                    waiting.append(message)
                    continue
                unready = 0
                items = len(work[message])
                yield message, self._lost(worker, message, items) if reply is None else self._judge(reply, items)

    def _events(self) -> list[tuple[WorkerProcess, dict | None]]:
        """Wait until a busy worker has replied, or has ended or overrun its time: then its reply is None."""
        busy = [worker for worker in self._running if worker.message is not None]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                if worker.send():
                    selector.register(worker.process.stdin, selectors.EVENT_WRITE, worker)
            ready = selector.select(max(0.0, min(worker.expires for worker in busy) - time.monotonic()))
        readable = {id(key.data) for key, mask in ready if mask & selectors.EVENT_READ}
        events: list[tuple[WorkerProcess, dict | None]] = []
        for worker in busy:
            lines = worker.receive() if id(worker) in readable else []
            if lines is None or (not lines and time.monotonic() >= worker.expires):
                events.append((worker, None))
                continue
            for line in lines:
                if line == b"started":
                    worker.started, worker.expires = True, time.monotonic() + self.deadline_seconds
                else:
                    events.append((worker, json.loads(line)))
        return events

    def _judge(self, reply: dict, items: int) -> Verdict:
        if reply["error"] is None:
            return Verdict(reply["correct"])
        self.crashed += items
        logger.warning("grading: the grader raised %s; the answer counts as wrong", reply["error"])
        return Verdict(False, "crashed")

    def _lost(self, worker: WorkerProcess, message: bytes, items: int) -> Verdict:
        """Count what was lost with its worker: killed at the deadline, or ended by what it did."""
        late = time.monotonic() >= worker.expires
        self.timeouts += late * items
        self.crashed += (not late) * items
        reason = f"took more than {self.deadline_seconds:g} s" if late else f"ended its worker ({worker.process.returncode})"
        end = message[-_LOGGED_CHARS:].decode("ascii").strip()
        logger.warning("grading: an answer %s and counts as wrong: ...%s", reason, end)
        return Verdict(False, "timeout" if late else "crashed")

    def _give_up_after(self, unready: int) -> None:
        if unready >= _STARTS:
            raise RuntimeError(
                f"{unready} grading workers in a row ended before they were ready: the installation or "
                f"memory_mib={self.memory_mib} is at fault, not an answer. Their own messages are on stderr; try "
                f"`{sys.executable} -c 'import math_verify, pylatexenc'`, or raise memory_mib."
            )

    def _start_worker(self) -> None:
        self._running.append(WorkerProcess(self.deadline_seconds, self.memory_mib))

    def _stop_worker(self, worker: WorkerProcess) -> None:
        self._running.remove(worker)
        worker.stop()
