"""However a run ends, nothing of its server is left: real guards around real processes that spawn others."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SECONDS = 20.0  # a busy machine; every one of these takes well under a second by itself

# A server that starts a worker in a session of its own, as vLLM's engine does; both note their pids and wait.
FAMILY = """
import os, subprocess, sys, time
worker = "import os, sys, time; open(sys.argv[1] + '/worker', 'w').write(str(os.getpid())); time.sleep(600)"
subprocess.Popen([sys.executable, "-S", "-c", worker, sys.argv[1]], start_new_session=True)
open(sys.argv[1] + "/server", "w").write(str(os.getpid()))
time.sleep(600)
"""
# The same, deaf to SIGTERM.
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FAMILY
# A server that leaves its worker behind and ends with status 7.
LEAVES = FAMILY.replace(
    "time.sleep(600)\n", "while not os.path.exists(sys.argv[1] + '/worker'): time.sleep(0.01)\nsys.exit(7)\n"
)


def wait_for(condition, what: str):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"no {what} after {SECONDS:.0f} s")


def pid_in(path: Path) -> int:
    return wait_for(lambda: path.exists() and path.read_text(), f"pid in {path.name}") and int(path.read_text())


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(*pids: int) -> None:
    for pid in pids:
        wait_for(lambda pid=pid: not alive(pid), f"end of process {pid}")


@pytest.fixture
def owner():
    """A process that lives until it is killed."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def guard(tmp_path, owner):
    """`guard(program)`: a running guard of that program, owned by `owner`; the pids of server and worker."""
    guards, pids = [], []

    def start(program: str) -> tuple[subprocess.Popen, int, int]:
        line = [sys.executable, "-m", "justrl_trl.servers.guard", str(owner.pid), "--"]
        guards.append(subprocess.Popen([*line, sys.executable, "-S", "-c", program, str(tmp_path)], start_new_session=True))
        family = pid_in(tmp_path / "server"), pid_in(tmp_path / "worker")
        pids.extend(family)
        return guards[-1], *family

    yield start
    for process in guards:
        process.kill()
        process.wait()
    for pid in pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_the_owner_is_killed_and_nothing_is_left(guard, owner, number):
    process, server, worker = guard(FAMILY)
    assert alive(server) and alive(worker)
    owner.send_signal(number)
    owner.wait()  # a zombie would still have its pid
    assert process.wait(timeout=SECONDS) == 0
    gone(server, worker)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=["SIGTERM", "SIGINT", "SIGHUP"])
def test_the_guard_is_told_to_stop_and_nothing_is_left(guard, owner, number):
    process, server, worker = guard(FAMILY)
    process.send_signal(number)
    assert process.wait(timeout=SECONDS) == 0
    gone(server, worker)
    assert owner.poll() is None


def test_the_server_ends_and_the_guard_returns_its_status_and_leaves_no_worker(guard):
    process, server, worker = guard(LEAVES)
    assert process.wait(timeout=SECONDS) == 7
    gone(server, worker)


def test_the_guard_itself_is_killed_and_its_server_dies_with_it(guard):
    process, server, worker = guard(FAMILY)
    process.kill()
    process.wait()
    gone(server)


def test_a_server_that_is_deaf_to_sigterm_is_killed(guard, owner):
    process, server, worker = guard(DEAF)
    started = time.monotonic()
    owner.kill()
    owner.wait()
    assert process.wait(timeout=2 * SECONDS) == 0
    gone(server, worker)
    assert time.monotonic() - started > 5, "SIGTERM, the chance to finish in order, comes first"


def test_a_server_of_an_owner_that_is_gone_already_is_never_started(tmp_path, owner):
    owner.kill()
    owner.wait()
    marker = tmp_path / "started"
    line = [sys.executable, "-m", "justrl_trl.servers.guard", str(owner.pid), "--"]
    done = subprocess.run([*line, sys.executable, "-c", f"open({str(marker)!r}, 'w')"], timeout=SECONDS)
    assert done.returncode == 0 and not marker.exists()


def test_a_server_keeps_to_its_core_with_everything_it_starts(owner):
    core = min(os.sched_getaffinity(0))
    child = "import os; print(os.sched_getaffinity(0))"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    line = [sys.executable, "-m", "justrl_trl.servers.guard", str(owner.pid), str(core), "--"]
    done = subprocess.run([*line, sys.executable, "-c", program], timeout=SECONDS, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str({core})
