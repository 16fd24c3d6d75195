"""vLLM plugin: registers weight-transfer engines that survive a broken push.

vLLM's own engines move weights over NCCL or CUDA IPC only, without a deadline, and put the parameters on the meta device when
an update starts: a push that breaks takes the server with it. These receive the same checkpoint-format tensors over gloo
(`justrl_gloo`: any machine, also a GPU that the trainer uses too, where NCCL refuses to run) or NCCL (`justrl_nccl`: a GPU of
its own), stage them in CPU memory and touch the model last. vLLM finds them through the entry point group
`vllm.general_plugins`, in every process that it spawns.
"""

import os
import select
import threading
from dataclasses import dataclass

import torch

GLOO_BACKEND, NCCL_BACKEND = "justrl_gloo", "justrl_nccl"
MANAGED_VARIABLE = "JUSTRL_MANAGED_SERVER"  # set for the processes of a managed server


def register() -> None:
    """Entry point, called in every vLLM process: make both backends known to `--weight-transfer-config`."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    engines = {GLOO_BACKEND: "GlooWeightTransferEngine", NCCL_BACKEND: "NcclWeightTransferEngine"}
    if engines.keys() <= WeightTransferEngineFactory._registry.keys():  # vLLM loads plugins more than once per process
        return
    if torch.cpu._is_amx_tile_supported():
        # vLLM's attention on a CPU uses AMX tiles without asking Linux for them, and a process that has not asked is killed
        torch.cpu._init_amx()
    for backend, engine in engines.items():
        WeightTransferEngineFactory.register_engine(backend, "justrl_trl.servers.vllm_engine", engine)
    if os.environ.get(MANAGED_VARIABLE):
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """vLLM's engine and worker outlive an API server that was killed with -9, and keep their GPU and cores; ours do not."""
    try:
        select.select([os.pidfd_open(parent)], [], [])
    except ProcessLookupError:
        pass  # gone before we looked
    os._exit(1)


@dataclass
class GroupInfo:
    """How to join the trainer's broadcast group, and what each push will bring.

    Attributes:
        address, port, world_size, timeout_seconds: of the group.
        rank_offset: rank of this server's first worker.
        generation: number of the group; a worker refuses a push of any other.
        names, dtype_names, shapes: checkpoint name, torch dtype name and shape of every tensor of a push, in order.
    """

    address: str
    port: int
    rank_offset: int
    world_size: int
    timeout_seconds: float
    generation: int
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass
class PushInfo:
    """Announces one push."""

    generation: int


def empty_tensors(info: GroupInfo) -> list[tuple[str, torch.Tensor]]:
    """Uninitialised CPU tensors `(name, tensor)` for one push, in the order of the manifest."""
    return [
        (name, torch.empty(shape, dtype=getattr(torch, dtype)))
        for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True)
    ]


def manifest_mismatch(info: GroupInfo, expected: dict[str, tuple[int, ...]]) -> str | None:
    """Why tensors of `info` do not fit a model whose checkpoint has the names and shapes `expected`; None if they do."""
    given = {name: tuple(shape) for name, shape in zip(info.names, info.shapes, strict=True)}
    for name in [*expected, *given]:
        if given.get(name) != expected.get(name):
            return f"{name} is {expected.get(name, 'absent')} here and {given.get(name, 'absent')} in the trainer"
    return None
