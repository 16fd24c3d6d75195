"""The servers of an evaluation: with nothing to train, every GPU is one.

Weights come from disk, so a server that is started again is current at once. A given server must hold exactly the weights that
are to be judged: same model, same precision, and no push of a trainer on top.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from justrl_trl.data.sources import DataError
from justrl_trl.evaluation.arguments import EvaluateArguments
from justrl_trl.evaluation.model import EvaluatedModel
from justrl_trl.evaluation.sampling import Request, check_fits
from justrl_trl.rollouts.client import RolloutClient
from justrl_trl.rollouts.pool import RolloutPool
from justrl_trl.runs.progress import Waiting
from justrl_trl.runs.servers import canonical, wait_for
from justrl_trl.servers.process import ManagedServer, ServerError, ServerSpec, check_compiler, pick_hardware


def server_places(count: int) -> list[dict]:
    """The device of each managed server, as `ServerSpec` wants it: a GPU, or a core where there is none.

    Args:
        count: 0: one per GPU, one without any.

    Raises:
        ServerError: more servers than GPUs.
    """
    gpus = torch.cuda.device_count()
    count = count or gpus or 1
    if gpus and count > gpus:
        raise ServerError(f"managed_servers={count}: this machine has {gpus} GPUs, and each server needs its own. Use {gpus}.")
    return [pick_hardware(0, gpus, index, count) for index in range(count)]


def start_servers(model: EvaluatedModel, args: EvaluateArguments, log_folder: Path, max_model_len: int) -> list[ManagedServer]:
    """Start the managed servers; returns at once.

    Args:
        log_folder: takes the servers' output.
        max_model_len: tokens of prompt and response.

    Raises:
        ServerError: more servers than GPUs, no compiler.
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
    places = enumerate(server_places(args.managed_servers), 1)
    specs = [ServerSpec(**common, **place, log_path=log_folder / f"vllm_server_{i}.log") for i, place in places]
    return [ManagedServer(spec) for spec in specs]


def connect(
    model: EvaluatedModel, args: EvaluateArguments, servers: list[ManagedServer], requests: list[Request]
) -> RolloutPool:
    """The pool of this evaluation: managed servers once they are healthy, or given ones, without those that do not answer
    within `vllm_server_timeout`. Each must serve what is to be judged and have room for every request.

    Raises:
        ServerError: which of these is not so, and what to do. Managed servers are stopped then.
    """

    def check(client: RolloutClient) -> None:
        context = check_server(client, model, args.server_dtype, args.weight_version)
        try:
            check_fits(requests, args.max_new_tokens, context, f"The server at {client.url}")
        except DataError as error:
            raise ServerError(str(error)) from error

    try:
        for server in servers:
            server.wait(args.vllm_server_timeout, Waiting(f"starting the vLLM server at {server.url}"))
        addresses = [(server.url, server.key) for server in servers] or [(url, None) for url in args.rollout_servers]
        clients = [RolloutClient(url, key, request_seconds=args.request_timeout) for url, key in addresses]
        absent = wait_for(clients, check, args.vllm_server_timeout)
    except BaseException:
        for server in servers:
            server.stop()
        raise
    pool = RolloutPool(clients, servers, max_num_seqs=args.server_max_num_seqs, wait_seconds=args.server_wait, say=tqdm.write)
    for member in pool.members:
        if member.client in absent:
            pool.lose(member, f"{absent[member.client]} The evaluation starts without it, and uses it when it is there.")
    pool.require(check)
    pool.current([member for member in pool.members if member.client not in absent], args.weight_version)
    return pool


def check_server(client: RolloutClient, model: EvaluatedModel, dtype: str, version: str) -> int:
    """Whether a given server serves what is to be judged.

    Returns:
        Tokens of prompt and response that it takes.

    Raises:
        ServerError: another model, precision or version of the weights; or it decodes nothing.
    """
    with client.understanding("/server_info"):
        served = client.vllm_config()["model_config"]
    if canonical(served["model"]) != canonical(model.path):
        raise ServerError(
            f"The server at {client.url} serves {served['model']!r}, and {model.name!r} is to be evaluated. Start it with "
            f"--model {model.path}, or evaluate --model {served['model']}."
        )
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
