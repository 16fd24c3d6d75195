"""The rollout servers of a run: start managed ones, connect to all of them, check that they fit the recipe."""

import os
from pathlib import Path

import torch
from accelerate import PartialState

from justrl_trl.background import Background, wait_for
from justrl_trl.config import JustRLConfig
from justrl_trl.distributed import on_rank_zero
from justrl_trl.errors import ConfigError, ServerError
from justrl_trl.preflight.gpu_memory import ModelSize, Sharing, server_bytes, share_gpu, trainer_bytes
from justrl_trl.rollouts.client import RolloutClient
from justrl_trl.rollouts.connect import check_model
from justrl_trl.rollouts.connect import connect as connect_pool
from justrl_trl.rollouts.pool import RolloutPool
from justrl_trl.servers.devices import pick_devices
from justrl_trl.servers.process import ManagedServer, ServerSpec, check_compiler
from justrl_trl.servers.vllm_plugin import GLOO_BACKEND


def plan_sharing(training: JustRLConfig, size: ModelSize, *, shards: int, trained: int) -> Sharing | None:
    """How a training rank and the managed server of this machine share a GPU; None if they do not.

    Args:
        size: of the model.
        shards: ranks that share the optimizer states.
        trained: parameters that are trained.

    Raises:
        ConfigError: they do not fit; or `shared_gpu_memory_utilization` is given and nothing is shared.
    """
    gpu = None
    if not training.rollout_servers:
        devices = _devices(training)
        gpu = devices[0]["gpu"] if devices[0]["weight_backend"] == GLOO_BACKEND else None
    asked = training.shared_gpu_memory_utilization
    if gpu is None:
        if asked is not None:
            raise ConfigError(
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
        sequences=training.server_max_num_seqs,
    )


def _devices(training: JustRLConfig) -> list[dict]:
    """The device of each managed server."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return pick_devices(training.managed_servers, gpus=torch.cuda.device_count(), ranks=ranks)


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
    devices = _devices(training)
    if sharing is not None:
        devices[0] |= {"gpu_memory_utilization": sharing.server, "gpu_kv_cache_bytes": sharing.kv_cache}
    logs = [log_path.with_stem(f"{log_path.stem}_{index + 1}") if index else log_path for index in range(count)]
    specs = [server_spec(model, training, revision, log, **own) for log, own in zip(logs, devices, strict=True)]
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
    """The pool of this run; see `rollouts.connect.connect`. Each server has the model, the context and weight transfer.

    Raises:
        ServerError: a server lacks one of these, or none answers.
    """
    return connect_pool(
        servers,
        training.rollout_servers,
        lambda client: check_server(client, model, training),
        seconds=training.vllm_server_timeout,
        request_seconds=training.request_timeout,
        max_num_seqs=training.server_max_num_seqs,
        heartbeat_timeout=training.server_heartbeat_timeout,
        wait_seconds=training.server_wait,
    )


def wait_for_servers(connecting: Background | None, state: PartialState) -> RolloutPool | None:
    """On all ranks: the pool on rank 0 once it is connected, None elsewhere. It may take longer than a collective may wait
    (`vllm_server_timeout` against `ddp_timeout`), so the ranks exchange a sign of life every minute.

    Args:
        connecting: on rank 0, `connect` under way.

    Raises:
        ServerError: on rank 0, from `connect`; `StoppedByRankZero` elsewhere.
    """
    on_rank_zero(lambda: wait_for(connecting), state)  # which sends what this returns to all ranks; the pool stays
    return connecting.result if connecting else None


def check_server(client: RolloutClient, model: str, training: JustRLConfig) -> None:
    """Raises `ServerError` if this run cannot use the server."""
    config = check_model(client, model, remedy="train with --model_name_or_path {served}")
    with client.understanding("/server_info"):
        length = config["model_config"]["max_model_len"]
    if length < training.vllm_max_model_length:
        raise ServerError(
            f"The server at {client.url} holds sequences of {length} tokens, the recipe needs {training.vllm_max_model_length} "
            f"(prompt + response). Start it with --max-model-len {training.vllm_max_model_length}."
        )
    if not config.get("weight_transfer_config"):
        raise ServerError(
            f"The server at {client.url} was started without weight transfer. Add --weight-transfer-config "
            '\'{"backend": "justrl_gloo"}\' (or justrl_nccl on a GPU of its own).'
        )
