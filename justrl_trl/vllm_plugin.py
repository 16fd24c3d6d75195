"""What runs inside a vLLM worker: the gloo weight-transfer engine, which vLLM itself lacks.

vLLM moves weights over NCCL or CUDA IPC only, so a server without a GPU (or one that shares its GPU with the trainer, where
NCCL refuses to run) could never be updated. This engine receives the same checkpoint-format tensors over gloo. vLLM finds it
through the entry point group `vllm.general_plugins`, in every process that it spawns.

It stages first and touches the model last: a push that breaks half way leaves the served weights as they were. (vLLM's own
engines put the parameters on the meta device when an update starts, so there a broken push takes the server with it.)
"""

import os
import select
import threading
from dataclasses import dataclass

import torch

BACKEND = "justrl_gloo"
MANAGED_VARIABLE = "JUSTRL_MANAGED_SERVER"  # set for the processes of a managed server


def register() -> None:
    """Entry point: make `--weight-transfer-config '{"backend": "justrl_gloo"}'` known; called in every vLLM process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:  # vLLM loads plugins more than once per process
        WeightTransferEngineFactory.register_engine(BACKEND, "justrl_trl.vllm_gloo_engine", "GlooWeightTransferEngine")
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
class GlooInitInfo:
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
class GlooUpdateInfo:
    """Announces one push."""

    generation: int


def empty_tensors(info: GlooInitInfo) -> list[tuple[str, torch.Tensor]]:
    """Uninitialised CPU tensors `(name, tensor)` for one push, in the order of the manifest."""
    return [
        (name, torch.empty(shape, dtype=getattr(torch, dtype)))
        for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True)
    ]


def manifest_mismatch(info: GlooInitInfo, expected: dict[str, tuple[int, ...]]) -> str | None:
    """Why tensors of `info` do not fit a model whose checkpoint has the names and shapes `expected`; None if they do."""
    given = {name: tuple(shape) for name, shape in zip(info.names, info.shapes, strict=True)}
    for name in [*expected, *given]:
        if given.get(name) != expected.get(name):
            return f"{name} is {expected.get(name, 'absent')} here and {given.get(name, 'absent')} in the trainer"
    return None
