"""Runs one rollout server and stops it when its owner ends: `python -m justrl_trl.servers.guard OWNER_PID [CORE] -- COMMAND`.

However the run ends (normal end, exception, Ctrl-C, SIGTERM, `kill -9` of the trainer), no `finally` block can be relied on
to stop a server that holds a GPU and a port. So a small process of its own watches the owner's pid: when the owner is gone,
the server and everything it spawned is terminated, then killed. It sits in its own session, so that Ctrl-C in the terminal
reaches the trainer alone and the trainer decides. A server without a GPU is kept on its CORE with all its processes: vLLM
pins the threads that compute, while its API server and engine would wait busily on the cores of its neighbours.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_GRACE_SECONDS = 8.0


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _die_with_guard() -> None:
    """In the server, before exec: the kernel kills it if the guard itself is killed."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop_descendants(grace_seconds: float = _GRACE_SECONDS) -> None:
    """SIGTERM, then after `grace_seconds` SIGKILL, to every process below this one, orphans included."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        _signal(child, signal.SIGTERM)
    _, alive = psutil.wait_procs(children, timeout=grace_seconds)
    # what was spawned meanwhile counts too
    for child in {*alive, *psutil.Process().children(recursive=True)}:
        _signal(child, signal.SIGKILL)
    psutil.wait_procs(psutil.Process().children(recursive=True), timeout=5)


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass  # it ended by itself between the listing and the signal


def main(owner_pid: int, command: list[str]) -> int:
    """Run `command` until it ends or the owner does; returns its exit status (0 when the owner ended first)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of the server come to us, not to init
    stop_read, stop_write = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.write(stop_write, bytes([number])))
    try:
        owner = os.pidfd_open(owner_pid)
    except ProcessLookupError:
        return 0
    server = subprocess.Popen(command, preexec_fn=_die_with_guard)
    server_fd = os.pidfd_open(server.pid)
    try:
        ready, _, _ = select.select([owner, server_fd, stop_read], [], [])
        if server_fd in ready:
            return server.wait()
        why = f"its owner {owner_pid} has ended" if owner in ready else signal.Signals(os.read(stop_read, 1)[0]).name
        print(f"server guard: stopping the server, {why}", flush=True)
        return 0
    finally:
        stop_descendants()


if __name__ == "__main__":
    separator = sys.argv.index("--")
    owner, *core = map(int, sys.argv[1:separator])
    if core:
        os.sched_setaffinity(0, core)  # children inherit it
    sys.exit(main(owner, sys.argv[separator + 1 :]))
