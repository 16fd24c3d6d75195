"""A pool of rollout servers: which are healthy, current, lost, or back.

The pool tracks the state of each server: one that dies, hangs, answers errors or holds old weights gets no prompt until
it is healthy and current again; managed servers are restarted. `dispatch` sends prompts to live servers, and
`weights.sender` updates the others. One thread per server probes its health.
"""

import math
import resource
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field

from justrl_trl.errors import ServerError
from justrl_trl.rollouts.client import RolloutClient, Unreachable
from justrl_trl.servers.process import ManagedServer

LIVE, STALE, DOWN = "live", "stale", "down"


class AllServersDown(ServerError):
    """No server came back within `wait_seconds`."""


class WeightsNeeded(ServerError):
    """All healthy servers hold old weights: push, then continue."""


@dataclass(eq=False)
class Member:
    """One server of the pool.

    Attributes:
        client: its HTTP client.
        server: its process, if this launch line started it.
        state: `live` (healthy, current weights), `stale` (healthy, other weights) or `down`.
        why: what was last wrong with it.
        in_flight: prompts that it works on.
        busy_seconds: time with at least one prompt in flight.
        prompts, failures: answered, and lost.
        excluded: the weight version with which it was found to compute wrongly; out for as long as it reports that.
        restart: its process is to be started anew.
    """

    client: RolloutClient
    server: ManagedServer | None = None
    state: str = STALE
    why: str = ""
    in_flight: int = 0
    busy_seconds: float = 0.0
    prompts: int = 0
    failures: int = 0
    excluded: str | None = None
    restart: bool = False
    _busy_since: float = field(default=0.0, repr=False)

    @property
    def url(self) -> str:
        return self.client.url

    def take(self) -> None:
        if self.in_flight == 0:
            self._busy_since = time.monotonic()
        self.in_flight += 1

    def give_back(self) -> None:
        self.in_flight -= 1
        if self.in_flight == 0:
            self.busy_seconds += time.monotonic() - self._busy_since


class RolloutPool:
    """The servers of a run; used on rank 0 only.

    Args:
        clients: one per server.
        servers: processes behind the clients, where managed; same order.
        max_num_seqs: sequences that one server decodes at once; bounds what is in flight there.
        heartbeat_seconds: how often each server is probed.
        heartbeat_timeout: seconds without an answer to a probe after which a server counts as hung.
        wait_seconds: how long to wait when no server is left.
        say: called with a line whenever a server goes or comes back.
    """

    def __init__(
        self,
        clients: Iterable[RolloutClient],
        servers: Iterable[ManagedServer] = (),
        *,
        max_num_seqs: int = 256,
        heartbeat_seconds: float = 5.0,
        heartbeat_timeout: float = 60.0,
        wait_seconds: float = 600.0,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ):
        clients = list(clients)
        servers = list(servers) or [None] * len(clients)
        self.members = [Member(client, server) for client, server in zip(clients, servers, strict=True)]
        self.max_num_seqs, self.wait_seconds, self.say = max_num_seqs, wait_seconds, say
        self.version: str | None = None  # of the weights that a live server holds
        self._updates = 0  # counts begins and ends of pushes; odd during a push, when versions seen by probes do not count
        self._heartbeat, self._heartbeat_timeout = heartbeat_seconds, heartbeat_timeout
        self._lengths: dict[int, float] = {}  # response tokens seen per prompt, for the order of dispatch
        _allow_many_connections()
        self._checks: list[Callable[[RolloutClient], None]] = []
        self._closed = threading.Event()
        for member in self.members:
            threading.Thread(target=self._probe_forever, args=(member,), daemon=True).start()

    # -- asking -------------------------------------------------------------------------------------------------------

    def expected_length(self, prompt: list[int]) -> float:
        """Response tokens of this prompt the last time; infinite for a new prompt, so that new prompts are sent first."""
        return self._lengths.get(hash(tuple(prompt)), math.inf)

    def learn_length(self, prompt: list[int], tokens: int) -> None:
        self._lengths[hash(tuple(prompt))] = tokens

    # -- states -------------------------------------------------------------------------------------------------------

    def live(self) -> list[Member]:
        return [member for member in self.members if member.state == LIVE]

    def reachable(self) -> list[Member]:
        """Live and stale members, which a push can include."""
        return [member for member in self.members if member.state != DOWN]

    def require(self, check: Callable[[RolloutClient], None]) -> None:
        """Add a check that a lost server must pass before it comes back: it may have been restarted with another model.

        Args:
            check: raises `ServerError` for a server that this run cannot use.
        """
        self._checks.append(check)

    def lose(self, member: Member, why: Exception | str) -> None:
        """Mark a member down: it gets no prompts until a probe finds it healthy."""
        if member.state != DOWN:
            member.state, member.failures = DOWN, member.failures + 1
            self._say_out(member, why)

    def exclude(self, member: Member, why: str) -> None:
        """Drop a server that is healthy but computes wrongly. A managed server is restarted; any other stays out until its
        weight version changes, which shows that it was restarted."""
        self.lose(member, why)
        if member.server is not None:
            member.restart = True  # done by the probing thread, the only one that restarts it
        else:
            member.excluded = self.version
            self.say(f"rollout server {member.url} stays out until it is restarted")

    def _say_out(self, member: Member, why: Exception | str) -> None:
        member.why = str(why)
        self.say(f"rollout server {member.url} is out: {member.why}")

    @contextmanager
    def update(self):
        """Context of a push."""
        self._updates += 1
        try:
            yield
        finally:
            self._updates += 1

    def current(self, members: list[Member], version: str) -> None:
        """Record that exactly these members hold `version`."""
        self.version = version
        for member in self.members:
            if member in members:
                member.state, member.why = LIVE, ""
            elif member.state == LIVE:
                member.state = STALE

    def wait_for_one(self, states: tuple[str, ...]) -> None:
        """Block until a member is in one of `states`, with a countdown.

        Raises:
            AllServersDown: after `wait_seconds`.
        """
        started, reported = time.monotonic(), -math.inf
        while not any(member.state in states for member in self.members):
            waited = time.monotonic() - started
            if waited > self.wait_seconds:
                raise AllServersDown(f"No rollout server came back within {self.wait_seconds:.0f} s. {self.describe()}")
            if waited - reported >= 15:
                reported = waited
                self.say(f"no rollout server is left; waiting, {self.wait_seconds - waited:.0f} s to go")
            time.sleep(0.2)

    def describe(self) -> str:
        """What is wrong with each server, for an error message."""
        return " ".join(f"{m.url}: {m.state}{', ' + m.why if m.why else ''}" for m in self.members)

    def close(self) -> None:
        """Stop probing and stop what this launch line started."""
        self._closed.set()
        for member in self.members:
            if member.server is not None:
                member.server.stop()

    def _probe_forever(self, member: Member) -> None:
        while not self._closed.wait(self._heartbeat):
            if member.restart:
                member.server.stop()
                member.restart = False
            if member.server is not None and member.server.ended and not self._closed.is_set():
                self.lose(member, f"its process ended. The end of {member.server.spec.log_path}:\n{member.server.log_tail(5)}")
                member.server.restart()
                self.say(f"rollout server {member.url} is started again")
            updates = self._updates
            try:
                version, error = member.client.health(self._heartbeat_timeout), None
                if member.state == DOWN:
                    for check in self._checks:
                        check(member.client)
                    member.client.resume()  # it may have been lost in a push, paused
            except ServerError as caught:
                version, error = None, caught
            except Exception as caught:  # a probe that ended would leave its server unwatched for good
                version, error = None, ServerError(f"{member.url} cannot be checked ({type(caught).__name__}: {caught})")
            if updates % 2 or updates != self._updates:
                continue  # a push was under way
            if error is not None:
                if member.state == DOWN and not isinstance(error, Unreachable) and member.why != str(error):
                    self._say_out(member, error)  # up again, but not what this run needs
                self.lose(member, error)
            elif member.state == DOWN and version == member.excluded:
                continue
            elif member.state == DOWN:
                member.excluded = None
                member.state = LIVE if version == self.version else STALE
                fit = "with current weights" if member.state == LIVE else f"with weights {version!r}: it waits for a push"
                self.say(f"rollout server {member.url} is back {fit}")
            elif member.state == LIVE and version != self.version:
                member.state = STALE  # restarted between two probes


def _allow_many_connections() -> None:
    """One request is one connection, and some thousand may be open at once; shells often allow a process 1,024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
