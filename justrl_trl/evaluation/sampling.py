"""The paper's evaluation: N responses to every problem, from the rollout pool, each handed over the moment it is there.

JustRL's `evals/gen_vllm.py`: the problem, one space, the boxed instruction (training puts a blank line there); the model's own
chat template; temperature 0.7, top-p 0.9, at most 31,744 new tokens. It draws N seeds that it does not record and uses each for
all problems. Here a sample's seed follows from the evaluation's seed and from which sample it is, whatever else is asked for in
the same call: an evaluation that goes on after an interruption asks for the samples that it would have asked for.

One request is one sample. The servers' prefix cache makes the prompt cheap to repeat, no sample waits for a longer one of the
same problem, and an interruption loses only what is being decoded. Nothing here knows files: `store` keeps what
`sample_all` hands over, and training can validate with the same function.
"""

import hashlib
import queue
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from justrl_trl.data.benchmarks import Problem
from justrl_trl.data.problems import EVAL_BOXED_SUFFIX, format_prompt
from justrl_trl.errors import DataError, ServerError
from justrl_trl.evaluation.store import Key
from justrl_trl.rollouts.client import Sampling
from justrl_trl.rollouts.dispatch import Rollouts
from justrl_trl.rollouts.pool import RolloutPool, WeightsNeeded
from justrl_trl.rollouts.seeds import seed_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 5
_LOG_SECONDS = 30.0


@dataclass(frozen=True)
class Task:
    """A benchmark as it is sampled here."""

    name: str  # "aime24"
    title: str  # "AIME 2024"
    problems: list[Problem]
    samples: int  # N: responses per problem


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A request for one sample; `problem` is its index in the task, from 0."""

    benchmark: str
    problem: int
    sample: int
    prompt: list[int]
    prompt_hash: str
    seed: int

    @property
    def key(self) -> Key:
        return self.benchmark, self.problem, self.sample


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """The answer to a request; `truncated`: stopped by `max_tokens`, not by a token that ends a response."""

    request: Request
    ids: list[int]
    truncated: bool


def eval_sampling(
    stop_token_ids: tuple[int, ...], *, max_new_tokens: int = 31_744, temperature: float = 0.7, top_p: float = 0.9
) -> Sampling:
    """The reference's sampling; whatever it leaves open is switched off."""
    rest = {"n": 1, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}
    return Sampling(
        max_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop_token_ids=tuple(stop_token_ids), **rest
    )


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase",
    problems: list[Problem],
    suffix: str = EVAL_BOXED_SUFFIX,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of each prompt, through the model's own chat template, up to where the response begins.

    Raises:
        DataError: when the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template to ask questions with: evaluate an "
            "instruction-tuned model, or set `tokenizer.chat_template` and save it with the model."
        )
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False, **(chat_template_kwargs or {})}
    return [tokenizer.apply_chat_template(format_prompt(one.problem, suffix), **options) for one in problems]


def requests_of(task: Task, prompts: list[list[int]], seed: int) -> list[Request]:
    """All samples of a task, the samples of a problem side by side."""
    hashes = [hashlib.sha256(array("q", prompt).tobytes()).hexdigest()[:16] for prompt in prompts]
    return [
        Request(task.name, problem, sample, prompt, hashes[problem], seed_for(seed, task.name, problem, sample))
        for problem, prompt in enumerate(prompts)
        for sample in range(task.samples)
    ]


def check_fits(
    requests: list[Request], max_new_tokens: int, context: int, holder: str, option: str = "--max_new_tokens"
) -> None:
    """Every prompt must leave room for the longest response, or some responses would be cut earlier than others.

    Args:
        context: tokens of prompt and response that `holder` (a model, a server) takes.
        option: what the user calls `max_new_tokens`.

    Raises:
        DataError: names the prompts that are too long, and what would fit.
    """
    lengths = {(one.benchmark, one.problem): len(one.prompt) for one in requests}
    long = [(name, tokens) for name, tokens in lengths.items() if tokens + max_new_tokens > context]
    if not long:
        return
    shown = ", ".join(f"{benchmark} problem {problem} ({tokens:,})" for (benchmark, problem), tokens in long[:_SHOWN])
    more = f" and {len(long) - _SHOWN:,} more" * (len(long) > _SHOWN)
    most = context - max(lengths.values())
    remedy = f"Use {option} {most} or less" if most > 0 else "Leave these benchmarks out"
    raise DataError(
        f"{holder} takes {context:,} tokens of prompt and response, and {option} {max_new_tokens} leaves "
        f"{max(context - max_new_tokens, 0):,} for a prompt. {len(long):,} of {len(lengths):,} prompts have more: "
        f"{shown}{more}. {remedy}, or something with a longer context."
    )


class SampleRequests(Rollouts):
    """Rollouts of one response each, every one with a seed of its own, given away as they come.

    Args:
        pool: servers that sample.
        requests: what is asked.
        sampling: for all of them; its `n` and `seed` are not used.
    """

    def __init__(self, pool: RolloutPool, requests: list[Request], sampling: Sampling):
        prompts, seeds = [request.prompt for request in requests], [request.seed for request in requests]
        super().__init__(pool, prompts, replace(sampling, n=1, seed=0), seeds)
        self._requests = requests

    def take(self, index: int) -> Response:
        """The response to a finished request, which is then forgotten here: all of an evaluation's would be gigabytes."""
        (ids,) = self.group(index)
        self._responses[index] = []
        cut = len(ids) == self._sampling.max_tokens and ids[-1] not in self._sampling.stop_token_ids
        return Response(self._requests[index], ids, cut)


def sample_all(pool: RolloutPool, requests: list[Request], sampling: Sampling, on_response: Callable[[Response], None]) -> None:
    """Ask for all of them, those that took longest before first.

    Args:
        on_response: called in the calling thread for each response as it comes; what it raises ends the sampling.

    Raises:
        AllServersDown, RequestRefused: see `Rollouts.run`.
        ServerError: only servers with other weights than the pool's are left.
    """
    rollouts = SampleRequests(pool, requests, sampling)

    def on_done(tokens: int, left: int) -> None:
        while True:
            try:
                index = rollouts.finished.get_nowait()
            except queue.Empty:
                return
            on_response(rollouts.take(index))

    try:
        rollouts.run(on_done)
    except WeightsNeeded as error:
        raise ServerError(
            f"The servers that are left hold other weights than {pool.version!r}: a trainer pushes to them. {error} Evaluate "
            "on servers of its own."
        ) from error


class Progress:
    """A bar in a terminal, a line now and then in a log file; with the time left.

    Args:
        what: is being done, e.g. "sampling".
        total: how much of it.
        unit: what is counted, e.g. "samples".
        note: called for what else is to be shown, given tokens per second.
    """

    def __init__(self, what: str, total: int, unit: str, note: Callable[[float], str] = lambda rate: ""):
        self._what, self._total, self._unit, self._note = what, total, unit, note
        self._bar = tqdm(total=total, desc=what, unit=f" {unit}", disable=None, smoothing=0.02, dynamic_ncols=True)
        self._done, self._tokens = 0, 0
        self._started = self._last_log = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        if self._bar.disable and self._done:
            elapsed = max(time.monotonic() - self._started, 1e-3)
            rate = f", {self._tokens / elapsed:,.0f} tok/s" if self._tokens else ""
            seconds = timedelta(seconds=round(elapsed))
            print(f"{self._what}: {self._done:,}/{self._total:,} {self._unit} in {seconds}{rate}", flush=True)
        self._bar.close()

    def update(self, count: int = 1, tokens: int = 0) -> None:
        """So many more are done."""
        self._done, self._tokens = self._done + count, self._tokens + tokens
        now = time.monotonic()
        elapsed = max(now - self._started, 1e-3)
        note = self._note(self._tokens / elapsed)
        if not self._bar.disable:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif now - self._last_log >= _LOG_SECONDS:
            self._last_log = now
            left = timedelta(seconds=round(elapsed * (self._total - self._done) / max(self._done, 1)))
            facts = ", ".join(filter(None, [f"{self._done:,}/{self._total:,} {self._unit}", note, f"left {left}"]))
            print(f"{self._what}: {facts}", flush=True)
