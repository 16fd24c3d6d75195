"""Which GPU or CPU core each rollout server of a machine gets, and which transport carries weights to it."""

import os

from justrl_trl.errors import ServerError
from justrl_trl.servers.vllm_plugin import GLOO_BACKEND, NCCL_BACKEND


def pick_devices(count: int, *, gpus: int, ranks: int = 0, chosen: str = "all", option: str = "managed_servers") -> list[dict]:
    """Devices of `count` servers beside `ranks` training ranks on one machine.

    Without a GPU: a core each, starting at the last one that this process may use, and gloo. With GPUs that no rank uses: one
    each, and NCCL. When every GPU has a rank, one server shares the last GPU and gets gloo (NCCL refuses two processes of a
    group on one GPU).

    Args:
        count: 0 means one per free GPU, or one without GPUs.
        gpus: GPUs of this machine.
        chosen: GPUs that servers may use: `all`, or a list such as `0-3,6`.
        option: name of the option that `count` comes from, for error messages.

    Returns:
        `gpu` (index or None), `core` and `weight_backend` of each server, as `process.ServerSpec` takes them.

    Raises:
        ServerError: there are too few GPUs for `count` servers, or `chosen` names GPUs that are not there.
    """
    if gpus == 0:
        cores = sorted(os.sched_getaffinity(0), reverse=True)
        return [{"gpu": None, "core": cores[i % len(cores)], "weight_backend": GLOO_BACKEND} for i in range(count or 1)]
    free = [gpu for gpu in _listed(chosen, gpus) if gpu >= ranks]
    count = count or len(free) or 1
    if count <= len(free):
        return [{"gpu": gpu, "core": 0, "weight_backend": NCCL_BACKEND} for gpu in free[:count]]
    if ranks and count == 1:
        return [{"gpu": gpus - 1, "core": 0, "weight_backend": GLOO_BACKEND}]
    beside = f" and {ranks} training ranks" if ranks else ""
    fewer = " or fewer ranks (--num_processes)" if ranks else ""
    raise ServerError(
        f"{option}={count} need a GPU each, but {gpus} GPUs{beside} leave {len(free)} of {chosen}. Use fewer servers{fewer}."
    )


def _listed(chosen: str, gpus: int) -> list[int]:
    """Indices in `0-3,6`."""
    if chosen == "all":
        return list(range(gpus))
    found: list[int] = []
    for part in chosen.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise ServerError(f"--gpus {chosen!r} is not a list of GPUs. Write all, 0-7 or 0,2,5.")
        found += range(int(first), int(last or first) + 1)
    absent = [gpu for gpu in found if gpu >= gpus]
    if absent:
        raise ServerError(f"--gpus {chosen}: this machine has {gpus} GPUs and no GPU {absent[0]}. Write all, or 0-{gpus - 1}.")
    return found
