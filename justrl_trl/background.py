"""Calls in daemon threads, e.g. to a server that may hang. (Python waits for an executor's threads at its exit.)"""

import threading
import time
from collections.abc import Callable


class Background(threading.Thread):
    """One call; it starts at once.

    Attributes:
        result, error: what it returned, or raised.
        ended: when it failed, on the monotonic clock.
    """

    def __init__(self, call: Callable[[], object]):
        super().__init__(daemon=True)
        self._call, self.result, self.error, self.ended = call, None, None, 0.0
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call()
        except Exception as error:  # read by the caller after `join`
            self.error, self.ended = error, time.monotonic()


def wait_for(call: Background) -> None:
    """Block until `call` has returned; raise what it raised."""
    call.join()
    if call.error is not None:
        raise call.error
