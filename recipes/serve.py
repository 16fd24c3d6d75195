"""Start the rollout servers of one node for a recipe, keep them running, print the addresses to train with.

    export JUSTRL_SERVER_KEY=...   # one long random string (openssl rand -hex 32), the same on servers and trainer
    python recipes/serve.py --config recipes/justrl_deepseek_1.5b.yaml --servers 8 --gpus 0-7 --host 10.0.0.5
    srun --ntasks-per-node 1 python recipes/serve.py --config ... --host $(hostname -i)      # on every server node

Each server has a GPU (or, without any, a core) of its own. One that dies is started again; the trainer brings it up to date
with its next push. Ctrl-C or SIGTERM stops them all.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from justrl_trl.errors import ServerError
from justrl_trl.knobs import knob
from justrl_trl.preflight.gpu_driver import check_gpu_driver
from justrl_trl.runs.arguments import parse_run
from justrl_trl.runs.servers import server_spec
from justrl_trl.runs.setup import resolve_model
from justrl_trl.servers.auth import SERVER_KEY
from justrl_trl.servers.devices import pick_devices
from justrl_trl.servers.process import ManagedServer, check_compiler
from justrl_trl.terminal import Waiting, quiet_libraries, report_errors


@dataclass
class ServeArguments:
    """What to start on this node."""

    servers: int = knob(0, "How many; 0: one per GPU of --gpus, or one without a GPU.", min=0)
    gpus: str = knob("all", "GPUs to use: all, 0-7 or 0,2,5.")
    host: str = knob("127.0.0.1", "Address to bind and to print; not 127.0.0.1 for other nodes.")
    first_port: int = knob(8000, "Port of the first server; the others follow.", min=1, max=65535)
    log_dir: str = knob("runs/servers", "Where the servers write.")


def main() -> None:
    quiet_libraries()
    check_gpu_driver()
    _, training, model, serve = parse_run(Path(__file__).with_name("tiny.yaml"), ServeArguments)
    if not os.environ.get(SERVER_KEY):
        raise ServerError(
            f"{SERVER_KEY} is not set, and whoever reaches a server could replace its weights. Set the same long random "
            f"string here and for the trainer: export {SERVER_KEY}=$(openssl rand -hex 32)"
        )
    check_compiler()
    devices = pick_devices(serve.servers, gpus=torch.cuda.device_count(), chosen=serve.gpus, option="servers")
    model_path = resolve_model(model, training)

    servers = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as Ctrl-C: through `finally`
    try:
        for index, device in enumerate(devices):
            own = {"host": serve.host, "port": serve.first_port + index, **device}
            log = Path(serve.log_dir) / f"server_{serve.first_port + index}.log"
            servers.append(ManagedServer(server_spec(model_path, training, model.model_revision, log, **own)))
        for server in servers:
            server.wait(training.vllm_server_timeout, Waiting(f"starting {server.url} (log: {server.spec.log_path})"))
        print(f"{len(servers)} servers of {model.model_name_or_path} are ready. Train with:", flush=True)
        print(f"--rollout_servers {' '.join(server.url for server in servers)}", flush=True)
        keep_running(servers)
    finally:
        for server in servers:
            server.stop()


def keep_running(servers: list[ManagedServer]) -> None:
    """Start again whatever ends, for ever; one that ends within a minute is given ever more time."""
    pause = dict.fromkeys((server.url for server in servers), 1.0)
    born = dict.fromkeys(pause, time.monotonic())
    while True:
        time.sleep(1)
        for server in servers:
            if server.ended and time.monotonic() - born[server.url] > pause[server.url]:
                lived = time.monotonic() - born[server.url]
                print(f"{server.url} ended; starting it again. The end of its log:\n{server.log_tail(5)}", flush=True)
                pause[server.url] = 1.0 if lived > 60 else min(300.0, 2 * pause[server.url])
                born[server.url] = time.monotonic()
                server.restart()


if __name__ == "__main__":
    with report_errors():
        main()
