"""Requests say everything, and whatever a server does wrong ends as a `ServerError`."""

import time

import pytest

from justrl_trl.errors import ServerError
from justrl_trl.rollouts.client import RequestRefused, RolloutClient, Sampling
from justrl_trl.servers.auth import SERVER_KEY
from tests.unit.fake_server import FakeServer

SAMPLING = Sampling(
    n=3,
    max_tokens=48,
    temperature=1.0,
    top_p=0.9,
    top_k=0,
    min_p=0.0,
    repetition_penalty=1.0,
    stop_token_ids=(2, 5),
    seed=100,
)
COMPLETIONS = "/v1/completions"
MODELS = {"data": [{"id": "served/model"}]}


def choices(prompt: list[int], n: int) -> list[dict]:
    """Response i to prompt p is [p..., i] with i + 1 repeats: told apart by content and by length; last one first."""
    made = [{"index": i, "token_ids": [*prompt, *[i] * (i + 1)]} for i in range(n)]
    return made[::-1]


def good(method: str, path: str, body: dict | None) -> tuple[int, object]:
    if path == "/v1/models":
        return 200, MODELS
    return 200, {"choices": choices(body["prompt"], body["n"])} if path == COMPLETIONS else {}


@pytest.fixture
def serve():
    """`serve(answer)`: a fake server and a client of it."""
    servers = []

    def start(answer=good, **client) -> tuple[FakeServer, RolloutClient]:
        servers.append(FakeServer(answer))
        return servers[-1], RolloutClient(servers[-1].url, "k3y", **client)

    yield start
    for server in servers:
        server.close()


def expected(prompts: list[list[int]]) -> list[list[int]]:
    return [[*prompt, *[i] * (i + 1)] for prompt in prompts for i in range(3)]


def test_a_request_states_all_of_the_sampling(serve):
    server, client = serve()
    client.sample([7, 8, 9], SAMPLING, 100)
    assert server.bodies(COMPLETIONS) == [
        {
            "model": "served/model",
            "prompt": [7, 8, 9],
            "n": 3,
            "max_tokens": 48,
            "temperature": 1.0,
            "top_p": 0.9,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": [2, 5],
            "seed": 100,
            "return_token_ids": True,
        }
    ]


def test_every_request_carries_the_key(serve, monkeypatch):
    server, client = serve()
    client.sample([1], SAMPLING, 100)
    monkeypatch.setenv(SERVER_KEY, "from environment")
    RolloutClient(server.url + "/").sample([1], SAMPLING, 100)
    keys = [headers["Authorization"] for *_, headers in server.requests]
    assert keys == ["Bearer k3y"] * 2 + ["Bearer from environment"] * 2  # model name, then the prompt


def test_the_model_name_is_asked_for_once(serve):
    server, client = serve()
    for _ in range(2):
        client.sample([1], SAMPLING, 100)
    assert client.model == "served/model" and len(server.bodies("/v1/models")) == 1


def test_a_proxy_of_the_environment_is_not_used(serve, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    _, client = serve()
    assert client.sample([1], SAMPLING, 100) == expected([[1]])


def test_prompt_logprobs_are_those_of_the_tokens_that_were_sent(serve):
    def answer(method, path, body):
        if path == "/v1/models":
            return 200, MODELS
        # vLLM adds the most likely token where it is another one; the first token has no entry
        entries = [None, {"7": {"logprob": -0.5}}, {"9": {"logprob": -2.5}, "4": {"logprob": -0.1}}]
        return 200, {"choices": [{"prompt_logprobs": entries}]}

    server, client = serve(answer)
    assert client.prompt_logprobs([3, 7, 9]) == [-0.5, -2.5]
    (body,) = server.bodies(COMPLETIONS)
    assert body["prompt"] == [3, 7, 9] and body["temperature"] == 1.0 and body["prompt_logprobs"] == 0


def test_scoring_has_not_the_deadline_of_a_whole_response(serve, monkeypatch):
    monkeypatch.setattr("justrl_trl.rollouts.client._SCORING_SECONDS", 0.3)
    _, client = serve(lambda method, path, body: (time.sleep(3 if path == COMPLETIONS else 0), good(method, path, body))[1])
    started = time.monotonic()
    with pytest.raises(ServerError, match="did not answer within 0 s"):
        client.prompt_logprobs([3, 7])
    assert time.monotonic() - started < 2, "the deadline of a response is an hour"


def test_weight_calls_go_where_vllm_has_them(serve):
    def answer(method, path, body):
        return 200, {
            "/get_world_size": {"world_size": 4},
            "/weight_info": {"weight_version": "12"},
            "/server_info?config_format=json": {"vllm_config": {"x": 1}},
            "/reset_prefix_cache": {"success": True},
            "/is_paused": {"is_paused": True},
        }.get(path, b"")  # the others answer with nothing

    server, client = serve(answer)
    assert client.world_size() == 4
    assert client.weight_version() == "12"
    assert client.vllm_config() == {"x": 1}
    client.init_weight_transfer_engine({"port": 5})
    client.pause()
    assert client.paused()
    client.start_weight_update()
    client.update_weights({"names": ["a"]})
    client.finish_weight_update("13")
    client.resume()
    assert [(method, path, body) for method, path, body, _ in server.requests] == [
        ("GET", "/get_world_size", None),
        ("GET", "/weight_info", None),
        ("GET", "/server_info?config_format=json", None),
        ("POST", "/init_weight_transfer_engine", {"init_info": {"port": 5}}),
        ("POST", "/pause?mode=abort", None),
        ("GET", "/is_paused", None),
        ("POST", "/start_weight_update", {}),
        ("POST", "/update_weights", {"update_info": {"names": ["a"]}}),
        ("POST", "/reset_prefix_cache", None),  # no KV block of the old weights survives; while paused, no new one is made
        ("POST", "/finish_weight_update", {"weight_version": "13"}),
        ("POST", "/resume", None),
    ]


@pytest.mark.parametrize("succeeds_at", [3, None])
def test_old_kv_blocks_that_are_still_in_use_are_waited_for_and_then_an_error(serve, monkeypatch, succeeds_at):
    monkeypatch.setattr("justrl_trl.rollouts.client._RESET_PAUSE_SECONDS", 0.01)
    attempts = []

    def answer(method, path, body):
        if path == "/reset_prefix_cache":
            attempts.append(path)
            return 200, {"success": len(attempts) == succeeds_at}
        return 200, {}

    server, client = serve(answer)
    if succeeds_at:
        client.finish_weight_update("13")
        assert len(attempts) == succeeds_at and server.bodies("/finish_weight_update") == [{"weight_version": "13"}]
    else:
        with pytest.raises(ServerError, match="still holds KV blocks of the old weights"):
            client.finish_weight_update("13")
        assert server.bodies("/finish_weight_update") == []  # not stamped: nobody may take it for current


def test_a_response_that_a_push_has_cut_off_is_no_response(serve):
    def answer(method, path, body):
        status, value = good(method, path, body)
        for choice in value.get("choices", [])[1:2]:
            choice["finish_reason"] = "abort"
        return status, value

    _, client = serve(answer)
    with pytest.raises(ServerError, match="aborted a response: weights were pushed"):
        client.sample([7, 8], SAMPLING, 100)


def failing(status: int, value: object, where: str = COMPLETIONS):
    def answer(method, path, body):
        return (status, value) if path == where else good(method, path, body)

    return answer


def test_a_wrong_key_says_which_two_differ(serve):
    _, client = serve(failing(401, {"error": "missing or wrong server key"}))
    with pytest.raises(
        ServerError, match=rf"/v1/completions answered 401: .*wrong server key.*{SERVER_KEY} of the trainer differ"
    ):
        client.sample([1], SAMPLING, 100)


def test_missing_weight_routes_say_how_to_open_them(serve):
    _, client = serve(lambda *request: (404, {"detail": "Not Found"}))
    with pytest.raises(ServerError, match=r"/start_weight_update answered 404: .*VLLM_SERVER_DEV_MODE=1"):
        client.start_weight_update()
    with pytest.raises(ServerError, match=r"/v1/completions answered 404: .*Not Found") as raised:
        client._model = "other/model"
        client.sample([1], SAMPLING, 100)
    assert "VLLM_SERVER_DEV_MODE" not in str(raised.value)  # that route is always there: it is the model that is not


def test_weight_transfer_that_is_off_says_how_to_turn_it_on(serve):
    _, client = serve(lambda *request: (500, {"error": "weight_transfer_config is not set"}))
    with pytest.raises(
        ServerError, match=r"answered 500: weight transfer is off. Start the server with --weight-transfer-config"
    ):
        client.init_weight_transfer_engine({})


def test_an_error_of_the_server_is_told_in_its_own_words(serve):
    _, client = serve(failing(500, {"error": "engine died: " + "x" * 5000}))
    with pytest.raises(ServerError, match=r"/v1/completions answered 500: .*engine died") as raised:
        client.sample([1], SAMPLING, 100)
    assert len(str(raised.value)) < 700  # but not at any length


def test_a_hanging_server_ends_at_the_deadline(serve):
    def hang(method, path, body):
        if path == COMPLETIONS:
            time.sleep(5)
        return good(method, path, body)

    _, client = serve(hang, request_seconds=0.3)
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"/v1/completions did not answer within 0 s. The server hangs or is overloaded"):
        client.sample([1], SAMPLING, 100)
    assert time.monotonic() - started < 3


def test_a_server_that_is_gone_says_where_to_look(serve):
    server, client = serve()
    server.close()
    with pytest.raises(ServerError, match=r"/weight_info cannot be reached .*died or was never there.*vllm_server\*\.log"):
        client.weight_version()


@pytest.mark.parametrize(
    "broken",
    [
        [],
        choices([1], 2),
        choices([1], 4),
        [*choices([1], 2), {"index": 2, "token_ids": []}],
        [*choices([1], 2), {"index": 2}],  # a server that does not know return_token_ids
        [*choices([1], 2), {"index": 2, "token_ids": None}],
    ],
    ids=["none", "too few", "too many", "an empty one", "no token ids", "null token ids"],
)
def test_anything_but_n_responses_is_an_error_with_both_numbers(serve, broken):
    _, client = serve(failing(200, {"choices": broken}))
    with pytest.raises(ServerError, match=rf"answered {len(broken)} responses.*3 were asked for.*pinned vLLM"):
        client.sample([1], SAMPLING, 100)


@pytest.mark.parametrize(
    "nonsense", [b"<html>a proxy's page</html>", {"data": []}, [1]], ids=["not JSON", "no model", "a list"]
)
def test_an_answer_of_another_form_is_a_server_error_too(serve, nonsense):
    _, client = serve(lambda *request: (200, nonsense))
    with pytest.raises(ServerError):
        client.sample([1], SAMPLING, 100)


@pytest.mark.parametrize("status", [400, 422])
def test_a_request_that_no_server_will_take_is_told_apart(serve, status):
    _, client = serve(failing(status, {"error": "max_tokens is too large"}))
    with pytest.raises(RequestRefused, match=f"answered {status}: .*max_tokens is too large"):
        client.sample([1], SAMPLING, 100)


def test_health_has_its_own_short_deadline(serve):
    def answer(method, path, body):
        if path == "/health":
            time.sleep(1)
        return 200, {"weight_version": "7"}

    _, client = serve(answer)
    assert client.health(5) == "7"
    with pytest.raises(ServerError, match="/health did not answer within 0 s"):
        client.health(0.2)


def test_an_update_that_a_dead_trainer_left_open_is_closed_first(serve):
    state = {"open": True}

    def answer(method, path, body):
        if path == "/start_weight_update" and state["open"]:
            return 500, {"error": "A weight update is already active"}
        if path == "/update_weights":
            state["open"] = False
            return 500, {"error": "Push of group generation -1 refused"}
        return 200, {}

    server, client = serve(answer)
    client.start_weight_update()
    assert [path for _, path, *_ in server.requests] == ["/start_weight_update", "/update_weights", "/start_weight_update"]
    assert server.bodies("/update_weights") == [{"update_info": {"generation": -1}}]
