"""Bring responses from rank 0 to every rank, in waves as they finish.

Rank 0 lets the pool work in a thread and passes on what has come back whenever there is enough for every rank to score one full
micro-batch; the others wait for its word, never longer than `PATIENCE_SECONDS`, however long the longest response takes.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from tqdm import tqdm

from justrl_trl.distributed import PATIENCE_SECONDS, broadcast_ragged, raise_together
from justrl_trl.rollouts.dispatch import Rollouts
from justrl_trl.rollouts.pool import AllServersDown, RolloutPool, WeightsNeeded

_GOES_ON, _COMPLETE, _NEEDS_WEIGHTS, _FAILED, _SERVERS_GONE = range(5)

Wave = dict[int, torch.Tensor]  # place of a response in the rollout step -> its token ids


class Generation:
    """The responses to the prompts of one rollout step; every method is called on every rank.

    Args:
        rollouts: on rank 0.
        responses_per_prompt: n.
        wave_tokens: tokens, prompts included, that a wave holds at most, unless one prompt makes more; None: responses come
            when all are there, or once a minute.
        accelerator: of the trainer.
        on_done: called on rank 0 per finished prompt, in another thread, see `Rollouts.run`.
    """

    def __init__(
        self,
        rollouts: Rollouts | None,
        responses_per_prompt: int,
        wave_tokens: int | None,
        accelerator: Accelerator,
        on_done: Callable[[int, int], None] = lambda tokens, left: None,
    ):
        self._rollouts, self._n, self._wave_tokens = rollouts, responses_per_prompt, wave_tokens
        self._accelerator, self._on_done = accelerator, on_done
        self._share = True
        self._error: Exception | None = None
        self._runner: threading.Thread | None = None
        self._carried: list[int] = []  # a finished prompt that the last wave had no room for

    def waves(self, push: Callable[[], None], give_up: Callable[[], None]) -> Iterator[tuple[Wave, bool]]:
        """Yield what has finished since the last time, and whether more is to come.

        Args:
            push: brings servers up to date when only some with old weights are left; a collective.
            give_up: called when no server comes back, before the error is raised; a collective.

        Raises:
            ServerError (rank 0) / StoppedByRankZero (others): no server comes back, or a prompt is refused.
        """
        state = _GOES_ON
        while state != _COMPLETE:
            done: list[int] = []
            if self._accelerator.is_main_process:
                done, state = self._next()
            state, wave = self._tell(done if self._share else [], state)
            if state == _NEEDS_WEIGHTS:
                push()
                self._runner = None
            elif state in (_FAILED, _SERVERS_GONE):
                if state == _SERVERS_GONE:
                    give_up()
                raise_together(self._error, self._accelerator)
            if wave:
                yield wave, state != _COMPLETE

    def finish(self, push: Callable[[], None], give_up: Callable[[], None]) -> None:
        """As `waves`, where only rank 0 needs the responses, which `rollouts` then has."""
        self._share = False
        for _ in self.waves(push, give_up):
            pass

    def _next(self) -> tuple[list[int], int]:
        """Rank 0: wait for a wave, for the end, or until `PATIENCE_SECONDS` are over."""
        if self._runner is None:
            self._error = None
            self._runner = threading.Thread(target=self._run, daemon=True)
            self._runner.start()
        done, self._carried, deadline = self._carried, [], time.monotonic() + PATIENCE_SECONDS
        tokens = sum(map(self._rollouts.tokens, done))
        while time.monotonic() < deadline:
            ended = not self._runner.is_alive()  # asked first: what it has put into the queue by then is all there is
            try:
                index = self._rollouts.finished.get(block=not ended, timeout=0.2)
            except queue.Empty:
                if ended:
                    return done, self._how_it_ended()
                continue
            tokens += self._rollouts.tokens(index)
            if self._wave_tokens is not None and done and tokens > self._wave_tokens:
                self._carried = [index]
                break
            done.append(index)
        return done, _GOES_ON

    def _run(self) -> None:
        try:
            self._rollouts.run(self._on_done)
        except Exception as error:  # raised in the main thread, on all ranks
            self._error = error

    def _how_it_ended(self) -> int:
        if self._error is None:
            return _COMPLETE
        if isinstance(self._error, WeightsNeeded):
            return _NEEDS_WEIGHTS
        return _SERVERS_GONE if isinstance(self._error, AllServersDown) else _FAILED

    def _tell(self, done: list[int], state: int) -> tuple[int, Wave]:
        """Rank 0's state and finished prompts, with their responses, on every rank: one broadcast, and three for a wave."""
        device = self._accelerator.device
        state, count = broadcast(torch.tensor([state, len(done)], dtype=torch.int32, device=device)).tolist()
        if not count:
            return state, {}
        prompts = torch.zeros(count, dtype=torch.int32, device=device)
        if self._accelerator.is_main_process:
            prompts.copy_(torch.tensor(done, dtype=torch.int32))
        prompts = broadcast(prompts).tolist()
        responses = [ids for index in done for ids in self._rollouts.group(index)] if done else None
        rows = broadcast_ragged(responses, count * self._n, self._accelerator)
        places = [prompt * self._n + copy for prompt in prompts for copy in range(self._n)]
        return state, dict(zip(places, rows, strict=True))


@contextmanager
def progress_bar(what: str, prompts: int, pool: RolloutPool | None) -> Iterator[Callable[[int, int], None]]:
    """In rank 0's terminal: prompts done, tokens per second, and how many still run. Yields `on_done(tokens, left)`."""
    off = True if pool is None else None  # None: off where there is no terminal
    with tqdm(total=prompts, desc=what, unit="prompt", leave=False, disable=off) as bar:
        tokens = 0

        def on_done(count: int, left: int) -> None:
            nonlocal tokens
            tokens += count
            rate = tokens / max(bar.format_dict["elapsed"], 1e-3)
            bar.set_postfix_str(f"{rate:,.0f} tok/s, {left} left, {len(pool.live())} servers", refresh=False)
            bar.update()

        yield on_done
