"""Ask a verifier model about responses that the rule grader rejects (JustRL's `evals/grade.py`, CompassVerifier-3B).

The verifier is behind any OpenAI-compatible server; this is its client. Protocol `exact` repeats the reference to the letter:
the question is empty (it never stored one), the gold answer is the raw field (AIME 2024: `\\boxed{204}`), the candidate is the
whole response, temperature 0, and only an output that is exactly "A" once stripped counts. `with_question` fills the
question in, which is how the model was trained. Either can only turn a wrong into a right.

A response longer than the verifier's context keeps its tail, where the answer is: two characters for every token of room (text
of mathematics has about three), and half of that again whenever the server still finds it too long.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import requests

from justrl_trl.errors import ConfigError, ServerError
from justrl_trl.evaluation.verifier_prompt import COMPASS_VERIFIER_PROMPT

VERIFIER_KEY = "JUSTRL_VERIFIER_KEY"
PROTOCOLS = ("exact", "with_question")
MAX_TOKENS = 2048  # of a verdict, as the reference
_CONTEXT = 32_768  # tokens of CompassVerifier-3B, where the server does not say
_CHARACTERS_PER_TOKEN = 2
_HALVINGS = 5
_CHECK_SECONDS = 5.0  # of patience before anything has begun


class VerifierError(ServerError):
    """The verifier's server cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Case:
    """What is to be judged: the problem, its raw gold answer, the whole response."""

    question: str
    gold: str
    response: str


@dataclass(frozen=True)
class Judgement:
    """Output of the verifier, and how many characters of the response were cut from its prompt."""

    output: str
    clipped: int

    @property
    def correct(self) -> bool:
        return self.output.strip() == "A"


class Verifier:
    """Client of one verifier server.

    Args:
        url: base URL, with or without `/v1`.
        model: name under which it is served; None: the only one that is.
        protocol: `exact` or `with_question`.
        key: default: environment variable `JUSTRL_VERIFIER_KEY`.
        concurrency: requests at a time.
        request_seconds: deadline of one answer.
        retry_seconds: how long a request is tried again after a lost connection, a 429 or a 5xx.

    Raises:
        ValueError: for an unknown protocol or something that is not an address.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        protocol: str = "exact",
        *,
        key: str | None = None,
        concurrency: int = 64,
        request_seconds: float = 600.0,
        retry_seconds: float = 120.0,
    ):
        if protocol not in PROTOCOLS:
            raise ConfigError(f"verifier_protocol={protocol!r} is unknown. Use {PROTOCOLS[0]!r} or {PROTOCOLS[1]!r}.")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"verifier_server={url!r} is not an address. Write it as http://HOST:PORT.")
        self.url, self.model, self.protocol = url.rstrip("/").removesuffix("/v1"), model, protocol
        self._key = key or os.environ.get(VERIFIER_KEY, "")
        self._concurrency, self._request_seconds, self._retry_seconds = concurrency, request_seconds, retry_seconds
        self._context = _CONTEXT

    def check(self) -> None:
        """Ask which models it serves, so that a wrong address is found before hours of sampling.

        Raises:
            VerifierError: it does not answer, refuses the key, or does not serve `model`.
        """
        answer = self._request("GET", "/v1/models", None, min(_CHECK_SECONDS, self._retry_seconds))
        try:
            served = {entry["id"]: entry.get("max_model_len") for entry in answer.json()["data"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise VerifierError(f"{self.url}/v1/models answered something else than a list of models: {error!r}.") from error
        if self.model is None and len(served) == 1:
            self.model = next(iter(served))
        if self.model not in served:
            raise VerifierError(
                f"The verifier at {self.url} serves {', '.join(served) or 'nothing'}, and "
                f"{'--verifier_model is not set' if self.model is None else f'--verifier_model is {self.model}'}. Give one of "
                "those names as --verifier_model."
            )
        self._context = served[self.model] or _CONTEXT

    def prompt(self, case: Case, characters: int | None = None) -> tuple[str, int]:
        """The verifier's prompt, and how many characters of the response were left out of it."""
        question = case.question if self.protocol == "with_question" else ""
        if characters is None:
            # a token of the prompt's own text is some four characters; counted as two it leaves some room
            own = len(COMPASS_VERIFIER_PROMPT) + len(question) + len(case.gold)
            characters = max(_CHARACTERS_PER_TOKEN * (self._context - MAX_TOKENS) - own, 0)
        tail = case.response[max(len(case.response) - characters, 0) :]
        filled = COMPASS_VERIFIER_PROMPT.format(question=question, gold_answer=case.gold, llm_response=tail)
        return filled, len(case.response) - len(tail)

    def judge(self, cases: Iterable[tuple[Hashable, Case]], on_verdict: Callable[[Hashable, Judgement], None]) -> None:
        """Have all cases judged, in no particular order.

        Args:
            cases: (name, case); read only as fast as the server answers, so texts need not all be in memory.
            on_verdict: called with (name, verdict) in the calling thread, as verdicts come.

        Raises:
            VerifierError: the server cannot be used; verdicts that came before have been handed over.
        """
        asked: queue.SimpleQueue = queue.SimpleQueue()
        answered: queue.SimpleQueue = queue.SimpleQueue()
        # daemons, and not an executor's threads: Python would wait for those at exit, whatever the server does
        threads = [threading.Thread(target=self._work, args=(asked, answered), daemon=True) for _ in range(self._concurrency)]
        for thread in threads:
            thread.start()
        try:
            flying = 0
            for item in cases:
                asked.put(item)
                flying += 1
                if flying >= self._concurrency:
                    self._collect(answered, on_verdict)
                    flying -= 1
            for _ in range(flying):
                self._collect(answered, on_verdict)
        finally:
            for _ in threads:
                asked.put(None)

    def ask(self, case: Case) -> Judgement:
        """One verdict.

        Raises:
            VerifierError: the server does not answer, answers in another format, or refuses.
        """
        characters = None
        for _ in range(_HALVINGS):
            text, clipped = self.prompt(case, characters)
            body = {"model": self.model, "messages": [{"role": "user", "content": text}]}
            body |= {"temperature": 0, "max_tokens": MAX_TOKENS}
            answer = self._request("POST", "/v1/chat/completions", body, self._retry_seconds)
            if answer.status_code == 200:
                return Judgement(_content(answer, self.url), clipped)
            characters = (len(case.response) - clipped) // 2  # too long for it
        raise VerifierError(
            f"The verifier at {self.url} refuses a request of {len(text):,} characters: {_words(answer)}. If that is too long "
            "for it, serve it with a longer context (--max-model-len 32768)."
        )

    def _work(self, asked: queue.SimpleQueue, answered: queue.SimpleQueue) -> None:
        while (item := asked.get()) is not None:
            try:
                answered.put((item[0], self.ask(item[1])))
            except Exception as error:  # raised again in the calling thread
                answered.put((item[0], error))

    def _collect(self, answered: queue.SimpleQueue, on_verdict: Callable[[Hashable, Judgement], None]) -> None:
        name, verdict = answered.get()
        if isinstance(verdict, Exception):
            raise verdict
        on_verdict(name, verdict)

    def _request(self, method: str, path: str, body: dict | None, patience: float) -> requests.Response:
        """An answer that is either good or a 400; what may pass is tried again for `patience` seconds, with growing pauses."""
        started, pause = time.monotonic(), 0.5
        while True:
            try:
                with requests.Session() as session:
                    session.trust_env = self.url.startswith("https://")  # no proxy on the way to a server of one's own
                    session.headers["Authorization"] = f"Bearer {self._key}"
                    answer = session.request(method, self.url + path, json=body, timeout=(10, self._request_seconds))
                if answer.status_code in (200, 400):
                    return answer
                why = f"{answer.status_code}: {_words(answer)}"
                if answer.status_code != 429 and answer.status_code < 500:
                    hint = f" Set {VERIFIER_KEY} to its key." if answer.status_code in (401, 403) else ""
                    raise VerifierError(f"The verifier at {self.url} answered {path} with {why}.{hint}")
            except requests.RequestException as error:
                why = type(error).__name__
            waited = time.monotonic() - started
            if waited + pause > patience:
                raise VerifierError(
                    f"The verifier at {self.url} does not answer ({why}); tried for {waited:.0f} s. Start it, for example with "
                    "`vllm serve opencompass/CompassVerifier-3B`, or leave --verifier_server out. Verdicts so far are kept."
                )
            time.sleep(pause)
            pause = min(2 * pause, 15.0)


def _content(answer: requests.Response, url: str) -> str:
    try:
        return answer.json()["choices"][0]["message"]["content"] or ""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise VerifierError(
            f"{url}/v1/chat/completions answered something that is not OpenAI's format ({type(error).__name__}: {error}). Is "
            "another program listening there?"
        ) from error


def _words(answer: requests.Response) -> str:
    return " ".join(answer.text.split())[:300]
