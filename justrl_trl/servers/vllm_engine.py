"""Weight-transfer engines inside a vLLM worker; only imported where vLLM already is."""

import logging
import os

import torch
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from justrl_trl.servers.broadcast_group import BroadcastGroup
from justrl_trl.servers.gloo_group import GlooGroup
from justrl_trl.servers.nccl_group import NcclGroup
from justrl_trl.servers.vllm_plugin import GroupInfo, PushInfo, empty_tensors, manifest_mismatch

_log = logging.getLogger("vllm.justrl_trl")


class StagedWeightTransferEngine(WeightTransferEngine[GroupInfo, PushInfo]):
    """Receives checkpoint-format weights from the trainer; loads them only when the whole push has arrived everywhere.

    Attributes:
        group_class: what carries the data.
    """

    init_info_cls = GroupInfo
    update_info_cls = PushInfo
    supports_draft_weight_update = False
    group_class: type[BroadcastGroup]

    def __init__(self, config, vllm_config, device, model):
        super().__init__(config, vllm_config, device, model)
        self._group: BroadcastGroup | None = None
        self._info: GroupInfo | None = None
        self._staged: list[tuple[str, torch.Tensor]] = []

    def init_transfer_engine(self, init_info: GroupInfo) -> None:
        """Join the group of a (new) trainer; the worker's rank counts data- and tensor-parallel workers.

        Raises:
            ValueError: before joining, if the trainer's tensors are not those of the served model: loading them would
                leave the engine with half a model.
        """
        mismatch = manifest_mismatch(init_info, _checkpoint_shapes(self.model_config.hf_config))
        if mismatch:
            raise ValueError(f"the trainer's weights do not fit the served model: {mismatch}")
        self.shutdown()
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        group = self.group_class(
            init_info.address,
            init_info.port,
            init_info.rank_offset + worker,
            init_info.world_size,
            init_info.timeout_seconds,
        )
        group.join()
        self._group, self._info = group, init_info

    def start_weight_update(self) -> None:
        """Forget what an earlier, broken push left behind. The model is not touched before `finish_weight_update`."""
        self._staged = []

    def update_weights(self, update_info: dict) -> None:
        """Receive one push. (The base class also synchronises an accelerator, which a CPU server does not have.)"""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: PushInfo) -> None:
        """Fill the staging tensors from the trainer's broadcasts."""
        current = None if self._group is None else self._info.generation
        if update_info.generation != current:
            raise RuntimeError(
                f"Push of group generation {update_info.generation} refused: this worker is in generation {current}. The "
                "trainer must call /init_weight_transfer_engine first."
            )
        staged = empty_tensors(self._info)
        for _, tensor in staged:
            self._group.broadcast(tensor)
        self._staged = staged

    def finish_weight_update(self) -> None:
        """Load the staged tensors as if from a checkpoint. A worker that cannot has half a model, and ends with its server."""
        if not self._staged:
            raise RuntimeError("finish_weight_update without weights: nothing was received since start_weight_update.")
        staged, self._staged = self._staged, []
        try:
            initialize_layerwise_reload(self.model)
            self.model.load_weights((name, tensor.to(self.device)) for name, tensor in staged)
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                _repack_tied_head(self.model)
        except Exception:
            _log.exception("pushed weights could not be loaded; this worker ends, because the model is neither old nor new")
            logging.shutdown()
            os._exit(1)

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group, self._staged = None, []


class GlooWeightTransferEngine(StagedWeightTransferEngine):
    """`justrl_gloo`."""

    group_class = GlooGroup


class NcclWeightTransferEngine(StagedWeightTransferEngine):
    """`justrl_nccl`."""

    group_class = NcclGroup


def _checkpoint_shapes(hf_config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's checkpoint, from its configuration alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _repack_tied_head(model: torch.nn.Module) -> None:
    """On CPU a tied `lm_head` multiplies by a packed copy of the embedding made at load time, which the layerwise reload
    does not make again; without this, a tied model keeps its old head."""
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False) and hasattr(model, "lm_head"):
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)
