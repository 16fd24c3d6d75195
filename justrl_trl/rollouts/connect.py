"""From servers to a pool: wait until they are healthy, check what they serve, leave out those that do not answer."""

import os
import time
from collections.abc import Callable

from justrl_trl.errors import ServerError
from justrl_trl.rollouts.client import RolloutClient, Unreachable
from justrl_trl.rollouts.pool import RolloutPool
from justrl_trl.servers.process import ManagedServer
from justrl_trl.terminal import Waiting

Check = Callable[[RolloutClient], object]  # raises ServerError for a server that cannot be used


def connect(
    servers: list[ManagedServer], urls: list[str] | None, check: Check, *, seconds: float, request_seconds: float, **pool
) -> RolloutPool:
    """A pool of managed servers, once they are healthy, or of running ones, as soon as all of them answer.

    Args:
        servers: managed servers, already started; they are stopped if this fails.
        urls: running servers, where `servers` is empty; key in `JUSTRL_SERVER_KEY`.
        check: run for every server now, and again before a lost server comes back.
        seconds: how long to wait (`vllm_server_timeout`); running servers that do not answer by then join later.
        request_seconds: deadline of one request (`request_timeout`).
        pool: further arguments of `RolloutPool`.

    Raises:
        ServerError: `check` fails, a managed server is not healthy in time, or no server answers.
    """
    try:
        for server in servers:
            server.wait(seconds, Waiting(f"starting the vLLM server at {server.url}"))
        addresses = [(server.url, server.key) for server in servers] or [(url, None) for url in urls or ()]
        clients = [RolloutClient(url, key, request_seconds=request_seconds) for url, key in addresses]
        absent = _wait_for(clients, check, seconds)
    except BaseException:
        for server in servers:
            server.stop()
        raise
    made = RolloutPool(clients, servers, **pool)
    for member in made.members:
        if member.client in absent:
            made.lose(member, f"{absent[member.client]} The work starts without it, and uses it when it is there.")
    made.require(check)
    return made


def _wait_for(clients: list[RolloutClient], check: Check, seconds: float) -> dict[RolloutClient, Unreachable]:
    """Wait until all servers answer and pass `check`, at most `seconds` plus the deadline of one answer.

    Returns:
        Servers that did not answer, with the last error of each.

    Raises:
        ServerError: from `check`, or because no server answered.
    """
    missing: dict[RolloutClient, Unreachable | None] = dict.fromkeys(clients)
    started, tick = time.monotonic(), Waiting("waiting for rollout servers")
    while True:
        for client in list(missing):
            try:
                check(client)
                del missing[client]
            except Unreachable as error:  # it may still be starting
                missing[client] = error
        waited = time.monotonic() - started
        if not missing or waited > seconds:
            break
        tick(waited)
        time.sleep(1)
    if len(missing) == len(clients):
        raise ServerError(
            f"No rollout server answered within vllm_server_timeout={seconds:.0f} s: "
            f"{' '.join(str(error) for error in missing.values())} Start them with recipes/serve.py, or check the addresses."
        )
    return missing


def check_model(client: RolloutClient, model: str, remedy: str) -> dict:
    """The model configuration of a server that serves `model`.

    Args:
        model: Hub id or local folder.
        remedy: what else the user could do, with `{served}` for what the server has.

    Raises:
        ServerError: it serves another model.
    """
    with client.understanding("/server_info"):
        config = client.vllm_config()
        served = config["model_config"]["model"]
    if _canonical(served) != _canonical(model):
        raise ServerError(
            f"The server at {client.url} serves {served!r}, and {model!r} is needed. Start it with --model {model}, or "
            f"{remedy.format(served=served)}."
        )
    return config


def _canonical(model: str) -> str:
    """The real path of a local folder, or a Hub id as it is."""
    return os.path.realpath(model) if os.path.isdir(model) else model
