"""HTTP client of one vLLM server: sample, score fixed tokens, drive a weight update.

One request per prompt, so that a response comes back when it is done and not when the slowest of 2,048 is, and a deadline on
every call, so that no server can hang the trainer; `pool` chooses the server. Token ids both ways: what the server sampled
is what is trained on, with no second tokenisation in between.
"""

import contextlib
import os
import time
from dataclasses import dataclass

import requests

from justrl_trl.errors import ServerError
from justrl_trl.servers.auth import SERVER_KEY


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling of one call, all of it explicit: a server otherwise fills gaps from the model's generation_config.json.

    Attributes:
        n: responses per prompt.
        max_tokens: response tokens at most.
        temperature, top_p, top_k, min_p, repetition_penalty: as in vLLM; top_k 0 keeps every token.
        stop_token_ids: tokens that end a response (kept as its last token).
        seed: base seed; the request for prompt i of a generation has seed + i x n, and vLLM gives its response k that + k.
    """

    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    stop_token_ids: tuple[int, ...]
    seed: int


_RESET_ATTEMPTS, _RESET_PAUSE_SECONDS = 20, 0.25
_SCORING_SECONDS = 180.0  # the first time vLLM compiles a kernel for it, for half a minute on a busy CPU
_ANSWER_SECONDS = 60.0  # what is known at once need not have the deadline of a whole response


class RequestRefused(ServerError):
    """The request itself is at fault: no server will take it."""


class Unreachable(ServerError):
    """Nothing answers at that address, or not in time: the server may be down, or not up yet."""


class RolloutClient:
    """HTTP client of one server; used on rank 0 only.

    Args:
        url: base URL of the server.
        key: key of the server; default: environment variable `JUSTRL_SERVER_KEY`.
        connect_seconds: deadline for a connection.
        request_seconds: deadline for the answer to one request: a whole response of `max_completion_length` tokens.

    Raises:
        ServerError: from every method, when the server is gone, answers an error, or answers in another format.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        connect_seconds: float = 10.0,
        request_seconds: float = 3600.0,
    ):
        self.url = url.rstrip("/")
        self._deadlines = (connect_seconds, request_seconds)
        self.key = key or os.environ.get(SERVER_KEY, "")
        self._model: str | None = None

    # -- asking -------------------------------------------------------------------------------------------------------

    def sample(self, prompt: list[int], sampling: Sampling, seed: int) -> list[list[int]]:
        """`n` responses to one prompt, as token ids; from the same seed (not `sampling`'s) any server gives the same ones."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "n": sampling.n,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "stop_token_ids": list(sampling.stop_token_ids),
            "seed": seed,
            "return_token_ids": True,
        }
        with self.understanding("/v1/completions"):
            choices = self._call("POST", "/v1/completions", body)["choices"]
            responses = [choice.get("token_ids") for choice in sorted(choices, key=lambda choice: choice["index"])]
            aborted = any(choice.get("finish_reason") == "abort" for choice in choices)
        if aborted:
            raise ServerError(f"The server at {self.url} aborted a response: weights were pushed to it meanwhile.")
        if len(responses) != sampling.n or not all(responses):
            raise ServerError(
                f"The server at {self.url} answered {len(responses)} responses, some of them perhaps empty, where {sampling.n} "
                "were asked for. Trainer and server must run the pinned vLLM; see its log."
            )
        return responses

    def prompt_logprobs(self, ids: list[int]) -> list[float]:
        """Log-probability of each token but the first given those before it: `len(ids) - 1` floats, temperature 1."""
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        with self.understanding("/v1/completions"):
            entries = self._call("POST", "/v1/completions", body, _SCORING_SECONDS)["choices"][0]["prompt_logprobs"][1:]
            return [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], entries, strict=True)]

    # -- knowing ------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """Name under which the server serves its one model."""
        if self._model is None:
            with self.understanding("/v1/models"):
                self._model = self._call("GET", "/v1/models", seconds=_ANSWER_SECONDS)["data"][0]["id"]
        return self._model

    def vllm_config(self) -> dict:
        """The server's resolved configuration, as vLLM's `/server_info` tells it."""
        with self.understanding("/server_info"):
            return self._call("GET", "/server_info?config_format=json", seconds=_ANSWER_SECONDS)["vllm_config"]

    def world_size(self) -> int:
        """Workers behind this server (tensor x pipeline x data parallel)."""
        with self.understanding("/get_world_size"):
            return int(self._call("GET", "/get_world_size", seconds=_ANSWER_SECONDS)["world_size"])

    def health(self, seconds: float) -> str:
        """The version of the weights of a server that answers within `seconds`."""
        self._call("GET", "/health", seconds=seconds)
        with self.understanding("/weight_info"):
            return self._call("GET", "/weight_info", seconds=seconds)["weight_version"]

    def weight_version(self) -> str:
        """The version stamped by the last finished push; `default` for weights from disk."""
        with self.understanding("/weight_info"):
            return self._call("GET", "/weight_info", seconds=_ANSWER_SECONDS)["weight_version"]

    # -- telling ------------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Abort what is decoded for requests that were given up, decode nothing new, and forget every KV block."""
        self._call("POST", "/pause?mode=abort", seconds=_ANSWER_SECONDS)

    def resume(self) -> None:
        """Decode again; a server that is not paused does not mind."""
        self._call("POST", "/resume", seconds=_ANSWER_SECONDS)

    def paused(self) -> bool:
        """Whether the server decodes nothing: a push is under way, or its trainer has died in one."""
        with self.understanding("/is_paused"):
            return bool(self._call("GET", "/is_paused", seconds=_ANSWER_SECONDS)["is_paused"])

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        """Let the workers join the trainer's group; returns when they have."""
        self._call("POST", "/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Open an update; close first what a dead trainer left open."""
        try:
            self._call("POST", "/start_weight_update", {})
        except ServerError as error:
            if "already active" not in str(error):
                raise
            self.abort_weight_update()
            self._call("POST", "/start_weight_update", {})

    def update_weights(self, update_info: dict) -> None:
        """Let the workers receive; returns when they have everything."""
        self._call("POST", "/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Let the workers use what they received, and stamp it; the server is paused and forgets every KV block first.

        Raises:
            ServerError: also if KV blocks of the old weights are still in use: responses would mix two policies.
        """
        self._forget_prefixes()
        self._call("POST", "/finish_weight_update", {"weight_version": weight_version})

    def _forget_prefixes(self) -> None:
        for _ in range(_RESET_ATTEMPTS):
            with self.understanding("/reset_prefix_cache"):
                if self._call("POST", "/reset_prefix_cache", seconds=_ANSWER_SECONDS)["success"]:
                    return
            time.sleep(_RESET_PAUSE_SECONDS)  # requests that were just aborted may hold theirs a moment longer
        raise ServerError(
            f"{self.url}/reset_prefix_cache does not succeed: some request still holds KV blocks of the old weights although "
            "the server is paused. See its log."
        )

    def abort_weight_update(self) -> None:
        """Close an update that a broken push or a dead trainer left open: vLLM does so when a worker refuses one."""
        with contextlib.suppress(ServerError):
            self._call("POST", "/update_weights", {"update_info": {"generation": -1}})

    def _call(self, method: str, path: str, body: dict | None = None, seconds: float | None = None) -> dict:
        """One request. `seconds` replaces the deadline of an answer, which is that of a whole response."""
        deadlines = self._deadlines if seconds is None else (min(seconds, self._deadlines[0]), seconds)
        where = f"{self.url}{path.split('?')[0]}"
        try:
            # A connection each: uvicorn drops idle ones after 5 s and those of a failed request at once, and a request sent
            # into such a connection is lost.
            with requests.Session() as session:
                session.trust_env = False  # no proxy between trainer and server
                session.headers["Authorization"] = f"Bearer {self.key}"
                answer = session.request(method, self.url + path, json=body, timeout=deadlines)
        except requests.Timeout as error:
            raise Unreachable(
                f"{where} did not answer within {deadlines[1]:.0f} s. The server hangs or is overloaded: see its log."
            ) from error
        except requests.RequestException as error:
            raise Unreachable(
                f"{where} cannot be reached ({type(error).__name__}). The rollout server has died or was never there: see "
                "its log (for a managed server: vllm_server*.log in the run folder)."
            ) from error
        if answer.status_code != 200:
            refused = answer.status_code in (400, 413, 422)  # another server would say the same
            raise (RequestRefused if refused else ServerError)(f"{where} answered {answer.status_code}: {_reason(answer)}")
        with self.understanding(path):
            return answer.json() if answer.content else {}

    @contextlib.contextmanager
    def understanding(self, path: str):
        """An answer of another shape than vLLM's is a server's fault like any other, not a bug of the trainer."""
        try:
            yield
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ServerError(
                f"{self.url}{path.split('?')[0]} answered something that is not vLLM's ({type(error).__name__}: {error}). Is "
                "another program listening there, or another version of vLLM?"
            ) from error


def _reason(answer: requests.Response) -> str:
    """The server's own words, with the remedy for the three ways in which a server is set up wrong."""
    text = answer.text.strip()[:500]
    if answer.status_code == 401:
        return f"{text} The key of the server and {SERVER_KEY} of the trainer differ."
    if answer.status_code == 404 and "/v1/" not in answer.url:
        return "the weight routes are off. Start the server with VLLM_SERVER_DEV_MODE=1 in its environment."
    if "weight_transfer_config" in text:
        return 'weight transfer is off. Start the server with --weight-transfer-config \'{"backend": "justrl_gloo"}\'.'
    return text
