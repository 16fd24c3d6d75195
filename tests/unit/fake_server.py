"""A rollout server of a few lines: real HTTP, answers written by the test, every request kept."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeServer:
    """Serves `answer(method, path, body) -> (status, value)` on 127.0.0.1, on a free port unless one is given, until closed.

    Attributes:
        url: base URL.
        requests: (method, path, body, headers) of every request, in order of arrival.
    """

    def __init__(self, answer: Callable[[str, str, dict | None], tuple[int, object]], port: int = 0):
        fake = self
        self.requests: list[tuple[str, str, dict | None, dict]] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                length = int(self.headers.get("content-length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                fake.requests.append((self.command, self.path, body, dict(self.headers)))
                status, value = answer(self.command, self.path, body)
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                try:
                    self.send_response(status)
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client has given up

            do_POST = do_GET

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 256  # as many may connect at once; the default of 5 resets the rest

        self._http = Server(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def bodies(self, path: str) -> list[dict | None]:
        """Bodies of the requests to `path`."""
        return [body for _, asked, body, _ in self.requests if asked == path]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
