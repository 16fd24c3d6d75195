"""Measure the seconds of each stage of a rollout step."""

import time
from collections import defaultdict
from contextlib import contextmanager

from justrl_trl.rollouts.pool import RolloutPool

STAGES = ("generation", "scoring", "training", "sync", "validation")


class StageClock:
    """Wall time of the stages of the current rollout step.

    Attributes:
        seconds: of each stage so far.
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._started = time.perf_counter()
        self._busy = 0.0  # seconds that servers had worked when the rollout step began

    @contextmanager
    def stage(self, name: str):
        """Add the time inside to a stage, less what stages inside it take for themselves."""
        started, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inner = sum(self.seconds.values()) - before
            self.seconds[name] += time.perf_counter() - started - inner

    def restart(self) -> None:
        """A new rollout step begins now."""
        self.seconds.clear()
        self._started = time.perf_counter()

    def metrics(self, generated: float, trained: float, pool: RolloutPool | None) -> dict[str, float]:
        """Of the finished rollout step; the next one begins.

        Args:
            generated, trained: response tokens.
            pool: on rank 0.
        """
        total = time.perf_counter() - self._started
        metrics = {f"seconds/{name}": self.seconds[name] for name in STAGES}
        metrics["seconds/total"] = total
        waited = self.seconds["generation"] + self.seconds["sync"] + self.seconds["validation"]
        # scoring that cost no time of its own: generation took this long anyway
        metrics["seconds/overlapped_scoring"] = self.seconds["overlapped_scoring"]
        metrics["seconds/generation"] += self.seconds["overlapped_scoring"]
        metrics["tokens_per_second/generation"] = generated / max(metrics["seconds/generation"], 1e-9)
        metrics["tokens_per_second/training"] = trained / max(self.seconds["training"], 1e-9)
        metrics["tokens_per_second/total"] = generated / total
        metrics["idle/trainer"] = waited / total
        if pool is not None:
            busy = sum(member.busy_seconds for member in pool.members)
            metrics["idle/servers"] = 1 - (busy - self._busy) / (total * len(pool.members))
            metrics["servers/live"] = len(pool.live())
            self._busy = busy
        self.restart()
        return metrics
