"""The parent's end of one grading process: start, feed, receive, kill.

The process is a fresh interpreter (`worker`) and not a fork: the caller has threads and CUDA, and a fork of it would be
as large as it is. `multiprocessing`'s spawn would run the caller's main module again, which imports torch and TRL.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

START_SECONDS = 120.0  # to import sympy from a cold network disk; does not count towards an item's deadline


class WorkerProcess:
    """One process and the item it is busy with."""

    def __init__(self, deadline_seconds: float, memory_mib: int):
        # -P and the path: the package itself, whatever the working directory holds; -W: Python warns about odd model text
        command = [sys.executable, "-P", "-W", "ignore", "-m", "justrl_trl.grading.worker"]
        paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [*command, str(os.getpid()), str(deadline_seconds), str(memory_mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"},
            process_group=0,  # Ctrl-C reaches the caller alone
        )
        os.set_blocking(self.process.stdin.fileno(), False)
        self.message: bytes | None = None  # the item it is busy with
        self.expires = 0.0  # when that item, or the start, has taken too long; `time.monotonic()`
        self.started = False  # whether the deadline of the current item has begun
        self._to_send, self._received = b"", b""

    def assign(self, message: bytes) -> None:
        self.message, self.started, self._to_send = message, False, message
        self.expires = time.monotonic() + START_SECONDS
        self.send()

    def send(self) -> bool:
        """Write what the pipe takes; True while something is left."""
        try:
            while self._to_send:
                self._to_send = self._to_send[os.write(self.process.stdin.fileno(), self._to_send) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._to_send = b""  # it has ended, which its output tells too
        return bool(self._to_send)

    def receive(self) -> list[bytes] | None:
        """Complete lines that have arrived; None when the process has ended."""
        data = os.read(self.process.stdout.fileno(), 2**16)
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        return lines

    def stop(self) -> int:
        """Kill it and return its exit status."""
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()
