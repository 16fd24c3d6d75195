"""Checks of address and run folder: servers can reach rank 0 for weights, all ranks can use the folder."""

import ipaddress
import os
import secrets
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from justrl_trl.config import JustRLConfig
from justrl_trl.errors import ConfigError
from justrl_trl.servers.broadcast_group import address_family

_FOLDER_SECONDS = 30.0  # for a network file system to show a new file everywhere


def check_weight_address(training: JustRLConfig) -> None:
    """On rank 0: workers on other machines can reach it for weights, and it can listen there.

    Raises:
        ConfigError: `weight_sync_address` is this machine's own, an address of another one, or its port is taken.
    """
    address, port = training.weight_sync_address, training.vllm_group_port
    if any(ipaddress.ip_address(found.split("%")[0]).is_unspecified for found in _resolve(address)):
        raise ConfigError(
            f"weight_sync_address={address!r} would open the weights to every network of this machine, and is no address that "
            f"workers can come to. Give one of rank 0's addresses, e.g. {_an_address() or '127.0.0.1'}."
        )
    remote = [url for url in training.rollout_servers or () if not _is_here(urlsplit(url).hostname or "")]
    if remote and _is_loopback(address):
        raise ConfigError(
            f"weight_sync_address={address!r} is an address that only this machine reaches, and {', '.join(remote)} run on "
            "others: they would wait for weights until weight_sync_timeout. Give the address of rank 0's machine in their "
            f"network: --weight_sync_address {_an_address() or 'ADDRESS'}"
        )
    try:
        socket.create_server((address, port), family=address_family(address)).close()
    except OSError as error:
        where = f"port {port} (vllm_group_port) of " if port else ""
        raise ConfigError(
            f"Rank 0 cannot listen on {where}weight_sync_address={address!r} ({error.strerror or error}), where rollout "
            "workers come for weights. Give an address of rank 0's own machine"
            + (", and a port that nothing uses, or 0 for a free one." if port else f", e.g. {_an_address() or '127.0.0.1'}.")
        ) from error


def _is_loopback(host: str) -> bool:
    return any(ipaddress.ip_address(found.split("%")[0]).is_loopback for found in _resolve(host))


def _is_here(host: str) -> bool:
    """Whether an address is one of this machine's; a name that cannot be resolved is not."""
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return any(found in own or ipaddress.ip_address(found.split("%")[0]).is_loopback for found in _resolve(host))


def _resolve(host: str) -> list[str]:
    try:
        return [str(info[4][0]) for info in socket.getaddrinfo(host, None)]
    except OSError:
        return []


def _an_address() -> str | None:
    """An IPv4 address of this machine that others may reach."""
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family == socket.AF_INET and not ipaddress.ip_address(one.address).is_loopback:
                return one.address
    return None


def check_writable_folder(path: Path) -> None:
    """On rank 0: the run folder is there, or can be made, and files can be written into it. Nothing is written.

    Raises:
        ConfigError: it cannot, or a part of its path is a file.
    """
    path = path.absolute()
    there = next(part for part in (path, *path.parents) if os.path.lexists(part))
    if not there.is_dir():
        raise ConfigError(f"output_dir={str(path)!r} cannot be a folder: {there} is none. Give another --output_dir.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output_dir={str(path)!r} cannot be written: {there} is read-only, or belongs to another user. Give another "
            "--output_dir, or change its permissions."
        )


def check_shared_folder(path: Path, state: PartialState) -> None:
    """On all ranks: what rank 0 writes into the run folder, every rank reads. Checkpoints are written there by all of them.

    Raises:
        ConfigError: on every rank, with the machines that do not see it.
    """
    if state.num_processes == 1:
        return
    token = [f".shared-{secrets.token_hex(8)}"]
    broadcast_object_list(token)
    file, made = path / token[0], []
    if state.is_main_process:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        file.touch()
    state.wait_for_everyone()
    deadline = time.monotonic() + _FOLDER_SECONDS
    while not (seen := file.exists()) and time.monotonic() < deadline:
        list(path.parent.glob("*"))  # a listing refreshes what NFS remembers of a folder
        time.sleep(0.2)
    blind = sorted({host for host in gather_object([None if seen else socket.gethostname()]) if host})
    if state.is_main_process:
        file.unlink()
        for folder in made:
            folder.rmdir()
    if blind:
        raise ConfigError(
            f"output_dir={str(path)!r} is not one folder for all ranks: what rank 0 writes there is not seen on "
            f"{', '.join(blind)}. Every rank writes its part of a checkpoint, and goes on from all of them: use a file system "
            "that all machines mount at the same place."
        )
