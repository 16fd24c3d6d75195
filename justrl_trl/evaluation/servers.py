"""The servers of an evaluation: one per GPU, with weights from disk.

Weights come from disk, so a server that is started again is current at once. A given server must hold exactly the weights that
are to be judged: same model, same precision, and no push of a trainer on top.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from justrl_trl.errors import DataError, ServerError
from justrl_trl.evaluation.arguments import EvaluateArguments
from justrl_trl.evaluation.model import EvaluatedModel
from justrl_trl.evaluation.sampling import Request, check_fits
from justrl_trl.rollouts.client import RolloutClient
from justrl_trl.rollouts.connect import check_model
from justrl_trl.rollouts.connect import connect as connect_pool
from justrl_trl.rollouts.pool import RolloutPool
from justrl_trl.servers.devices import pick_devices
from justrl_trl.servers.process import ManagedServer, ServerSpec, check_compiler


def devices(args: EvaluateArguments) -> list[dict]:
    """The device of each managed server, see `servers.devices.pick_devices`."""
    return pick_devices(args.managed_servers, gpus=torch.cuda.device_count())


def start_servers(model: EvaluatedModel, args: EvaluateArguments, log_folder: Path, max_model_len: int) -> list[ManagedServer]:
    """Start the managed servers; returns at once.

    Args:
        log_folder: takes the servers' output.
        max_model_len: tokens of prompt and response.

    Raises:
        ServerError: there are more servers than GPUs, or there is no compiler.
    """
    check_compiler()
    common = dict(
        model=model.path,
        revision=model.revision,
        dtype=args.server_dtype,
        max_model_len=max_model_len,
        host="127.0.0.1",
        port=0,
        max_num_seqs=args.server_max_num_seqs,
        kv_cache_bytes=args.server_kv_cache_mib << 20,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        seed=args.seed,
    )
    places = enumerate(devices(args), 1)
    specs = [ServerSpec(**common, **place, log_path=log_folder / f"vllm_server_{i}.log") for i, place in places]
    return [ManagedServer(spec) for spec in specs]


def connect(
    model: EvaluatedModel, args: EvaluateArguments, servers: list[ManagedServer], requests: list[Request]
) -> RolloutPool:
    """The pool of this evaluation; see `rollouts.connect.connect`. Each server holds the weights to be judged, and has room for
    every request.

    Raises:
        ServerError: a server lacks one of these, or none answers. Managed servers are stopped then.
    """

    def check(client: RolloutClient) -> None:
        context = check_server(client, model, args.server_dtype, args.weight_version)
        try:
            check_fits(requests, args.max_new_tokens, context, f"The server at {client.url}")
        except DataError as error:
            raise ServerError(str(error)) from error

    pool = connect_pool(
        servers,
        args.rollout_servers,
        check,
        seconds=args.vllm_server_timeout,
        request_seconds=args.request_timeout,
        max_num_seqs=args.server_max_num_seqs,
        wait_seconds=args.server_wait,
        say=tqdm.write,
    )
    pool.current(pool.reachable(), args.weight_version)
    return pool


def check_server(client: RolloutClient, model: EvaluatedModel, dtype: str, version: str) -> int:
    """Whether a given server serves what is to be judged.

    Returns:
        Tokens of prompt and response that it takes.

    Raises:
        ServerError: another model, precision or version of the weights; or it decodes nothing.
    """
    served = check_model(client, model.path, remedy="evaluate --model {served}")["model_config"]
    there = str(served.get("dtype", dtype)).removeprefix("torch.")
    if there != dtype:
        raise ServerError(
            f"The server at {client.url} holds weights in {there}, and --server_dtype is {dtype}. Give --server_dtype {there}, "
            f"or start the server with --dtype {dtype}."
        )
    held = client.weight_version()
    if held != version:
        raise ServerError(
            f"The server at {client.url} holds weights of version {held!r}, and --weight_version is {version!r}: 'default' are "
            "those from disk, others a trainer has pushed. Start the server again, or give "
            f"--weight_version {held} to judge what it holds."
        )
    if client.paused():
        raise ServerError(
            f"The server at {client.url} is paused: a trainer is pushing weights to it, or died while it did. Wait for the "
            "push to end, or start the server again."
        )
    return served["max_model_len"]
