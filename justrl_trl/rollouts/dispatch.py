"""Give prompts to the servers of a pool, and again when a server is lost.

One request per prompt goes to the least loaded live server. What a lost server had goes to another one, with the same seed;
what has been received is never asked for twice. Prompts are given out and taken back in the thread that calls `Rollouts.run`;
request threads only report.
"""

import math
import queue
import threading
from collections import deque
from collections.abc import Callable

from justrl_trl.errors import ServerError
from justrl_trl.rollouts.client import RequestRefused, Sampling
from justrl_trl.rollouts.pool import DOWN, LIVE, STALE, Member, RolloutPool, WeightsNeeded
from justrl_trl.rollouts.seeds import request_seeds


def generate(
    pool: RolloutPool, prompts: list[list[int]], sampling: Sampling, on_done=lambda tokens, left: None
) -> list[list[int]]:
    """`len(prompts) * n` responses, the n of a prompt side by side, in the order of `prompts`; see `Rollouts.run`."""
    rollouts = Rollouts(pool, prompts, sampling)
    rollouts.run(on_done)
    return rollouts.responses()


class Rollouts:
    """The prompts of one generation and what has come back; survives a push in between.

    Args:
        pool: servers that sample.
        prompts, sampling: what is asked.
        seeds: of each prompt's request; default: `seeds.request_seeds` from `sampling.seed` on.
    """

    def __init__(self, pool: RolloutPool, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None = None):
        self._pool, self._prompts, self._sampling = pool, prompts, sampling
        self._seeds = seeds or request_seeds(sampling.seed, len(prompts), sampling.n)
        self._left = len(prompts)
        self._responses: list[list[list[int]] | None] = [None] * len(prompts)
        self._attempts = [0] * len(prompts)
        longest_first = sorted(range(len(prompts)), key=lambda i: -pool.expected_length(prompts[i]))
        self._waiting = deque(longest_first)
        self._asked: dict[int, tuple[Member, int]] = {}  # prompt -> member that works on it, attempt
        self._reports: queue.SimpleQueue = queue.SimpleQueue()
        self.finished: queue.SimpleQueue[int] = queue.SimpleQueue()  # prompts, as their responses come in

    @property
    def left(self) -> int:
        """Prompts without responses."""
        return self._left

    def responses(self) -> list[list[int]]:
        """All responses, the n of a prompt side by side."""
        return [ids for group in self._responses for ids in group]

    def group(self, index: int) -> list[list[int]]:
        """The responses of one finished prompt."""
        return self._responses[index]

    def tokens(self, index: int) -> int:
        """Tokens of the sequences, prompt and response, that one finished prompt makes."""
        return sum(len(self._prompts[index]) + len(ids) for ids in self._responses[index])

    def run(self, on_done: Callable[[int, int], None] = lambda tokens, left: None) -> None:
        """Ask until everything is there. May be called again after `WeightsNeeded`.

        Args:
            on_done: called per finished prompt with the tokens it brought and the prompts that are left.

        Raises:
            WeightsNeeded: only servers with old weights are left.
            AllServersDown: none came back in time.
            RequestRefused: a server will not take a prompt, whichever server it is.
        """
        try:
            while self.left:
                self._dispatch()
                if not self._asked:
                    self._pool.wait_for_one((LIVE, STALE))
                    if not self._pool.live():
                        raise WeightsNeeded(f"{self.left} prompts are left. {self._pool.describe()}")
                    continue
                try:
                    report = self._reports.get(timeout=0.5)
                except queue.Empty:
                    report = None
                if report is not None:
                    self._handle(*report, on_done)
                self._take_back()
        finally:
            for index in list(self._asked):  # their reports are ignored from now on
                self._release(index)

    def _dispatch(self) -> None:
        """Give waiting prompts to the least loaded live servers, as many as they can decode at once and a few more."""
        most = math.ceil(self._pool.max_num_seqs / self._sampling.n) + 2
        while self._waiting:
            member = min(self._pool.live(), key=lambda m: m.in_flight, default=None)
            if member is None or member.in_flight >= most:
                return
            index = self._waiting.popleft()
            if self._responses[index] is not None:
                continue  # a late answer was faster
            self._attempts[index] += 1
            self._asked[index] = (member, self._attempts[index])
            member.take()
            threading.Thread(target=self._ask, args=(index, self._attempts[index], member), daemon=True).start()

    def _ask(self, index: int, attempt: int, member: Member) -> None:
        try:
            answer = member.client.sample(self._prompts[index], self._sampling, self._seeds[index])
        except Exception as error:  # judged by the calling thread
            answer = error
        self._reports.put((index, attempt, member, answer))

    def _handle(self, index: int, attempt: int, member: Member, answer, on_done) -> None:
        mine = self._asked.get(index) == (member, attempt)
        if mine:
            self._release(index)
        if not isinstance(answer, Exception):
            if self._responses[index] is None:  # else: it was sent elsewhere meanwhile, and that answer was first
                self._responses[index] = answer
                self._left -= 1
                self.finished.put(index)
                member.prompts += 1
                tokens = sum(map(len, answer))
                self._pool.learn_length(self._prompts[index], tokens)
                on_done(tokens, self.left)
            return
        if isinstance(answer, RequestRefused) or not isinstance(answer, ServerError):
            raise answer
        if mine:
            self._pool.lose(member, answer)
            self._again(index, answer)

    def _again(self, index: int, why: Exception) -> None:
        limit = 3 * len(self._pool.members) + 2
        if self._attempts[index] >= limit:
            raise ServerError(f"Prompt {index} failed {limit} times, on every server; the last time: {why}") from why
        self._waiting.appendleft(index)

    def _take_back(self) -> None:
        """Prompts of servers that a probe found hung or gone go elsewhere; a late answer is still welcome."""
        for index, (member, _) in list(self._asked.items()):
            if member.state == DOWN:
                self._release(index)
                self._again(index, ServerError(member.why))

    def _release(self, index: int) -> None:
        """Count a prompt as no longer in flight; otherwise a server that hung would look busy for the rest of the run."""
        member, _ = self._asked.pop(index)
        member.give_back()
