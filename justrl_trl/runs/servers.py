"""The rollout servers of a run: started here, or given by address and checked before they are used."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from justrl_trl.config import JustRLConfig
from justrl_trl.preflight.gpu_memory import ModelSize, Sharing, server_bytes, share_gpu, trainer_bytes
from justrl_trl.rollouts.client import RolloutClient, Unreachable
from justrl_trl.rollouts.pool import RolloutPool
from justrl_trl.runs.progress import Waiting
from justrl_trl.servers.process import ManagedServer, ServerError, ServerSpec, check_compiler, pick_hardware
from justrl_trl.servers.vllm_plugin import GLOO_BACKEND


def plan_sharing(training: JustRLConfig, size: ModelSize, *, shards: int, trained: int) -> Sharing | None:
    """How a training rank and the managed server of this machine share a GPU; None if they do not.

    Args:
        size: of the model.
        shards: ranks that share the optimizer states.
        trained: parameters that are trained.

    Raises:
        ValueError: they do not fit; or `shared_gpu_memory_utilization` is given and nothing is shared.
    """
    gpu = None
    if not training.rollout_servers:
        hardware = _hardware(training)
        gpu = hardware[0]["gpu"] if hardware[0]["weight_backend"] == GLOO_BACKEND else None
    asked = training.shared_gpu_memory_utilization
    if gpu is None:
        if asked is not None:
            raise ValueError(
                f"shared_gpu_memory_utilization={asked} has no effect: no managed server of this run shares a GPU with a rank. "
                "Leave it out; vllm_gpu_memory_utilization is for servers with a GPU of their own."
            )
        return None
    return share_gpu(
        gpu,
        torch.cuda.get_device_properties(gpu).total_memory,
        trainer_bytes(
            size,
            shards=shards,
            tokens=training.max_tokens_per_micro_batch,
            width=2 if training.bf16 or training.fp16 else 4,
            checkpointing=training.gradient_checkpointing,
            trained=trained,
        ),
        server_bytes(size, width=4 if training.server_dtype == "float32" else 2, context=training.vllm_max_model_length),
        asked=asked,
        most=training.vllm_gpu_memory_utilization,
    )


def _hardware(training: JustRLConfig) -> list[dict]:
    """Where each managed server goes."""
    ranks, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), training.managed_servers
    return [pick_hardware(ranks, torch.cuda.device_count(), index, count) for index in range(count)]


def start_servers(
    model: str, training: JustRLConfig, revision: str | None, log_path: Path, sharing: Sharing | None = None
) -> list[ManagedServer]:
    """Start the managed servers of this machine; returns at once (see `ManagedServer.wait`).

    Args:
        sharing: from `plan_sharing`.
    """
    check_compiler()
    count = training.managed_servers
    if training.vllm_server_port and count > 1:
        raise ServerError(f"vllm_server_port={training.vllm_server_port} is one port, managed_servers={count}. Leave it at 0.")
    hardware = _hardware(training)
    if sharing is not None:
        hardware[0]["gpu_memory_utilization"] = sharing.server
    logs = [log_path.with_stem(f"{log_path.stem}_{index + 1}") if index else log_path for index in range(count)]
    specs = [server_spec(model, training, revision, log, **own) for log, own in zip(logs, hardware, strict=True)]
    return [ManagedServer(spec) for spec in specs]


def server_spec(model: str, training: JustRLConfig, revision: str | None, log_path: Path, **own) -> ServerSpec:
    """A server for this recipe; `own` says on which device, and what else is its own."""
    values = dict(
        model=model,
        revision=revision,
        dtype=training.server_dtype,
        max_model_len=training.vllm_max_model_length,
        host=training.vllm_server_host,
        port=training.vllm_server_port,
        max_num_seqs=training.server_max_num_seqs,
        kv_cache_bytes=training.server_kv_cache_mib << 20,
        gpu_memory_utilization=training.vllm_gpu_memory_utilization,
        seed=training.seed,
        log_path=log_path,
    )
    return ServerSpec(**values | own)


def connect(model: str, training: JustRLConfig, servers: list[ManagedServer]) -> RolloutPool:
    """The pool of this run: managed servers once they are healthy, or given ones as soon as all of them answer, and without
    those that do not within `vllm_server_timeout`. Each serves this model, at sufficient length, with weight transfer on.

    Raises:
        ServerError: which of these is not so, or that none answers, and what to do.
    """
    for server in servers:
        server.wait(training.vllm_server_timeout, Waiting(f"starting the vLLM server at {server.url}"))
    addresses = [(server.url, server.key) for server in servers] or [(url, None) for url in training.rollout_servers]
    clients = [RolloutClient(url, key, request_seconds=training.request_timeout) for url, key in addresses]
    missing = wait_for(clients, lambda client: check_server(client, model, training), training.vllm_server_timeout)
    pool = RolloutPool(
        clients,
        servers,
        max_num_seqs=training.server_max_num_seqs,
        heartbeat_timeout=training.server_heartbeat_timeout,
        wait_seconds=training.server_wait,
    )
    for member in pool.members:
        if member.client in missing:
            pool.lose(member, f"{missing[member.client]} The run starts without it, and uses it when it is there.")
    pool.require(lambda client: check_server(client, model, training))
    return pool


def wait_for(
    clients: list[RolloutClient], check: Callable[[RolloutClient], None], seconds: float
) -> dict[RolloutClient, Unreachable]:
    """Wait until all servers answer and pass `check`, but no longer than `seconds` and the deadline of one answer.

    Returns:
        Those that did not answer, and why.

    Raises:
        ServerError: from `check`; or none of them answered.
    """
    missing: dict[RolloutClient, Unreachable | None] = dict.fromkeys(clients)
    started, told = time.monotonic(), Waiting("waiting for rollout servers")
    while True:
        for client in list(missing):
            try:
                check(client)
                del missing[client]
            except Unreachable as error:  # not up yet, perhaps
                missing[client] = error
        waited = time.monotonic() - started
        if not missing or waited > seconds:
            break
        told(waited)
        time.sleep(1)
    if len(missing) == len(clients):
        raise ServerError(
            f"No rollout server answered within vllm_server_timeout={seconds:.0f} s: "
            f"{' '.join(str(error) for error in missing.values())} Start them with recipes/serve.py, or check the addresses."
        )
    return missing


def check_server(client: RolloutClient, model: str, training: JustRLConfig) -> None:
    """Raises `ServerError` if the server is not one that this run can use."""
    url, config = client.url, client.vllm_config()
    with client.understanding("/server_info"):
        served, length = config["model_config"]["model"], config["model_config"]["max_model_len"]
    if canonical(served) != canonical(model):
        raise ServerError(
            f"The server at {url} serves {served!r}, the trainer trains {model!r}. Weights of one do not fit the other: start "
            f"the server with --model {model}, or train with --model_name_or_path {served}."
        )
    if length < training.vllm_max_model_length:
        raise ServerError(
            f"The server at {url} holds sequences of {length} tokens, the recipe needs {training.vllm_max_model_length} "
            f"(prompt + response). Start it with --max-model-len {training.vllm_max_model_length}."
        )
    if not config.get("weight_transfer_config"):
        raise ServerError(
            f"The server at {url} was started without weight transfer. Add --weight-transfer-config "
            '\'{"backend": "justrl_gloo"}\' (or justrl_nccl on a GPU of its own).'
        )


def canonical(model: str) -> str:
    """A model's folder whatever way it is written, or its Hub id."""
    return os.path.realpath(model) if os.path.isdir(model) else model
