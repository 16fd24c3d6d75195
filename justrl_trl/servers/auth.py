"""Require a key for every endpoint of a rollout server.

vLLM's own `--api-key` guards `/v1/*` only: with the development routes on (weight transfer needs them), anyone who reaches
the port could replace the weights or stop the engine. This ASGI middleware (vLLM's `--middleware`) answers 401 to every
request without the key, except `GET /health`, which tells only that the server is alive.
"""

import hmac
import os

SERVER_KEY = "JUSTRL_SERVER_KEY"
_OPEN_PATHS = frozenset({"/health"})
_UNAUTHORIZED = b'{"error": "missing or wrong server key: send `Authorization: Bearer $JUSTRL_SERVER_KEY`"}'


class RequireKey:
    """ASGI middleware; the key comes from the environment variable `JUSTRL_SERVER_KEY`, never from the command line.

    Raises:
        RuntimeError: if the variable is unset, so that a server can never come up open by accident.
    """

    def __init__(self, app):
        key = os.environ.get(SERVER_KEY)
        if not key:
            raise RuntimeError(
                f"The environment variable {SERVER_KEY} is not set. A rollout server takes weights and commands from "
                "whoever knows the key, so it does not start without one. Set it to a long random string on the server "
                "and on the trainer."
            )
        self.app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope, receive, send):
        health = scope["type"] == "http" and scope["method"] == "GET" and scope["path"] in _OPEN_PATHS
        if scope["type"] == "lifespan" or health:
            return await self.app(scope, receive, send)
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if hmac.compare_digest(given, self._expected):
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_UNAUTHORIZED)).encode())]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": _UNAUTHORIZED})
