"""A call in a daemon thread, for HTTP calls whose server may hang: Python joins an executor's threads at its exit."""

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
        except Exception as error:  # looked at by whoever joins
            self.error, self.ended = error, time.monotonic()
