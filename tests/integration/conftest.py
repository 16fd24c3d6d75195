"""Real parts, started once: two vLLM CPU servers (untied and tied model) and one full run of the embedded recipe.

Every process started here carries a mark in its environment, so that a test can ask "what of ours still runs?".
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from justrl_trl.data.tiny import tiny_base
from justrl_trl.rollouts.client import RolloutClient
from justrl_trl.rollouts.pool import RolloutPool
from justrl_trl.servers.process import ManagedServer, ServerSpec

ROOT = Path(__file__).parents[2]
MARK = "JUSTRL_TEST_MARK"
TWO_RANKS = ["--config_file", str(ROOT / "accelerate_configs" / "zero3_cpu_2proc.yaml")]
ONE_GPU = ["--config_file", str(ROOT / "accelerate_configs" / "zero3_1gpu.yaml")]
GPU = torch.cuda.is_available()
RANKS = 1 if GPU else 2  # of the launch line: NCCL refuses two ranks on one GPU
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # for two ranks, on a GPU machine too
# for programs of the tests: this checkout first, other packages where they were
ON_PATH = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
# the process that holds the model: on a GPU vLLM's engine runs its only worker itself
MODEL_PROCESS = "VLLM::Engine" if GPU else "VLLM::Worker"

pytestmark = pytest.mark.timeout(900)


def pytest_collection_modifyitems(items):
    """On one GPU these run too, with servers on it; but for those that are about cores or two ranks of a launch."""
    for item in items:
        if GPU and item.get_closest_marker("cpu_only"):
            item.add_marker(pytest.mark.skip(reason=f"about a CPU: {item.get_closest_marker('cpu_only').args[0]}"))


def _launcher(ranks: int) -> list[str]:
    """Options of `accelerate launch`: on a GPU one ZeRO-3 rank, else two of them, or one plain process."""
    if GPU:
        return ONE_GPU
    return TWO_RANKS if ranks == 2 else []


class Launch:
    """The launch line in a process of its own: `accelerate launch [two ranks] recipes/grpo_justrl.py ...`."""

    def __init__(self, log: Path, *options: str, ranks: int = RANKS):
        self.mark, self.log, self._sessions = uuid.uuid4().hex, log, set()
        command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *_launcher(ranks)]
        command += [str(ROOT / "recipes" / "grpo_justrl.py"), *map(str, options)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, MARK: self.mark},
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                os.killpg(self.process.pid, signal.SIGKILL)
                pytest.fail(f"still running after {seconds} s:\n{self.output()[-4000:]}")
            self.alive()  # learns the sessions of new processes
            time.sleep(1)
        return self.process.returncode

    def alive(self) -> list[psutil.Process]:
        """Every running process of this launch: ranks, guard, server, engine, worker. They carry the mark, or, where vLLM
        has written its process title over the environment, share a session with one that was seen to carry it."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                session = os.getsid(process.pid)
                if process.environ().get(MARK) == self.mark:
                    self._sessions.add(session)
                if session in self._sessions:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
                continue
        return found


@pytest.fixture(scope="session")
def base() -> Path:
    """The tiny base, built on first use."""
    return tiny_base()


@pytest.fixture(scope="session")
def tied_model(base, tmp_path_factory) -> Path:
    """A random model whose head is its embedding, as in Qwen2.5-1.5B or SmolLM2."""
    path = tmp_path_factory.mktemp("tied")
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def start(model: Path, log: Path, core: int, dtype: str = "bfloat16") -> ManagedServer:
    cores = sorted(os.sched_getaffinity(0))
    return ManagedServer(
        ServerSpec(
            model=str(model),
            dtype=dtype,
            max_model_len=512,
            host="127.0.0.1",
            port=0,
            max_num_seqs=64,
            kv_cache_bytes=64 << 20,
            gpu_memory_utilization=0.1,
            gpu=0 if GPU else None,
            core=cores[core % len(cores)],
            weight_backend="justrl_gloo",
            seed=1,
            log_path=log,
        )
    )


def pool_of(servers: list[ManagedServer], **options) -> RolloutPool:
    """A pool of healthy servers as they are, on the weights they have; they are not restarted."""
    clients = [RolloutClient(server.url, server.key, request_seconds=120) for server in servers]
    pool = RolloutPool(clients, **{"heartbeat_seconds": 1.0, "heartbeat_timeout": 20.0, "wait_seconds": 30.0} | options)
    pool.current(pool.members, clients[0].weight_version())
    return pool


@pytest.fixture(scope="session")
def servers(base, tied_model, tmp_path_factory):
    """`{"untied": pool, "tied": pool}` of a real server each, up for the whole session."""
    logs = tmp_path_factory.mktemp("servers")
    running = {
        "untied": start(base, logs / "untied.log", core=0),
        "tied": start(tied_model, logs / "tied.log", core=1),
    }
    try:
        for server in running.values():
            server.wait(600)
        yield {name: pool_of([server]) for name, server in running.items()}
    finally:
        for server in running.values():
            server.stop()


@pytest.fixture(scope="session")
def launch(tmp_path_factory) -> Callable[..., Launch]:
    """Start the launch line; whatever is left of it at the end of the session is killed."""
    logs, started = tmp_path_factory.mktemp("launch"), []

    def run(*options: str, ranks: int = RANKS) -> Launch:
        started.append(Launch(logs / f"{len(started)}.log", *options, ranks=ranks))
        return started[-1]

    yield run
    for one in started:
        for process in one.alive():
            process.kill()
