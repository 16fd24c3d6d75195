"""Nothing but `/health` answers without the key, over any ASGI protocol, and no server starts without one."""

import asyncio
import json

import pytest

from justrl_trl.servers.auth import SERVER_KEY, RequireKey

KEY = "0123456789abcdef"


class FakeApp:
    """Records every call and answers 200 over HTTP, accept over a websocket, complete at startup."""

    def __init__(self):
        self.scopes = []

    async def __call__(self, scope, receive, send):
        self.scopes.append(scope)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"ok"})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
        else:
            await send({"type": "lifespan.startup.complete"})


def call(scope: dict) -> tuple[FakeApp, list[dict]]:
    """What a guarded app is asked and what goes out for one connection."""
    app, sent = FakeApp(), []

    async def receive():
        raise AssertionError("the guard must not read the request")

    async def send(message):
        sent.append(message)

    asyncio.run(RequireKey(app)(scope, receive, send))
    return app, sent


def http(path: str, *headers: tuple[bytes, bytes], method: str = "GET") -> dict:
    return {"type": "http", "method": method, "path": path, "headers": list(headers)}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(SERVER_KEY, KEY)


RIGHT = (b"authorization", b"Bearer " + KEY.encode())
# vLLM's open routes and the development routes that can replace weights or stop the engine
ROUTES = ["/v1/completions", "/v1/models", "/server_info", "/update_weights", "/reset_prefix_cache", "/", "/health/", "/ping"]
WRONG = {
    "no header": (),
    "another key": ((b"authorization", b"Bearer " + KEY[::-1].encode()),),
    "empty": ((b"authorization", b""),),
    "no scheme": ((b"authorization", KEY.encode()),),
    "another scheme": ((b"authorization", b"Basic " + KEY.encode()),),
    "a part of the key": ((b"authorization", b"Bearer " + KEY[:-1].encode()),),
    "more than the key": ((b"authorization", b"Bearer " + KEY.encode() + b"0"),),
    "not ASCII": ((b"authorization", "Bearer ключ".encode()),),
    "another header": ((b"x-api-key", KEY.encode()),),
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
def test_every_route_is_refused_without_the_key(path, headers):
    app, sent = call(http(path, *headers, method="POST"))
    assert app.scopes == [], "the request reached the server"
    start, body = sent
    assert (start["type"], start["status"]) == ("http.response.start", 401)
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert KEY not in body["body"].decode() and SERVER_KEY in json.loads(body["body"])["error"]


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_is_open_with_the_key(path):
    scope = http(path, (b"host", b"127.0.0.1"), RIGHT, method="POST")
    app, sent = call(scope)
    assert app.scopes == [scope] and sent[0]["status"] == 200


def test_health_is_open_to_all():
    assert call(http("/health"))[1][0]["status"] == 200
    assert call(http("/health", *WRONG["another key"]))[1][0]["status"] == 200


def test_a_websocket_is_closed_without_the_key_and_accepted_with_it():
    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    app, sent = call(scope)
    assert app.scopes == [] and sent == [{"type": "websocket.close", "code": 1008}]
    assert call(scope | {"headers": [RIGHT]})[1] == [{"type": "websocket.accept"}]


def test_startup_and_shutdown_pass():
    assert call({"type": "lifespan"})[1] == [{"type": "lifespan.startup.complete"}]


@pytest.mark.parametrize("value", [None, ""])
def test_no_server_starts_without_a_key(monkeypatch, value):
    monkeypatch.delenv(SERVER_KEY) if value is None else monkeypatch.setenv(SERVER_KEY, value)
    with pytest.raises(RuntimeError, match=f"{SERVER_KEY} is not set.*Set it to a long random string"):
        RequireKey(FakeApp())


def test_a_key_that_changes_later_opens_nothing(monkeypatch):
    app = FakeApp()
    guard = RequireKey(app)
    monkeypatch.setenv(SERVER_KEY, "another")
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(guard(http("/v1/models", (b"authorization", b"Bearer another")), None, send))
    assert app.scopes == [] and sent[0]["status"] == 401
