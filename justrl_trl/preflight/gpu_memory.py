"""Estimate GPU memory, and split a GPU that a training rank and a rollout server share.

vLLM takes its share at its start and keeps it, and starts only where so much is free. So the share is what the trainer leaves
at its peak, less a reserve, and the trainer is held to the rest: a server that dies next to it can come back. Its KV cache is
given in bytes: vLLM would measure what is left for it by the free memory before and after a trial pass, and count what the
trainer takes meanwhile as its own.
"""

import math
from dataclasses import dataclass

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from justrl_trl.errors import ConfigError

GIB = 1 << 30
_LIVE_PARAMETERS = 1e9  # DeepSpeed's stage3_max_live_parameters: gathered at a time
_RUNTIME_BYTES = 3 * GIB  # an allowance for the CUDA context, NCCL's and cuBLAS' buffers, and fragments
_OUTSIDE_BYTES = 2 * GIB  # of these, what torch's allocator does not count, and so cannot hold the trainer to
_SERVER_RUNTIME_BYTES = 4 * GIB  # an allowance for vLLM's CUDA graphs, activations of a prefill and sampling buffers
_BLOCK = 128  # tokens: vLLM allots whole blocks of the KV cache, smaller than this, and keeps one for itself
_MARGIN = 0.03  # of the card, for what neither of the two counts
_SPARE_FOR_SERVER = 0.6  # of what is left over, for its KV cache; the rest is the trainer's, whose needs are an estimate


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides how much memory it takes; numbers, not bytes.

    Attributes:
        parameters, layers, hidden, intermediate, vocabulary: as in its config.
        kv_heads, head_dim: of its attention.
    """

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    kv_heads: int
    head_dim: int


def model_size(model: str, revision: str | None = None) -> ModelSize:
    """From the config alone; no weights are read."""
    config = AutoConfig.from_pretrained(model, revision=revision)
    with torch.device("meta"):  # the class itself: `from_config` would shard it among the ranks of a ZeRO-3 run
        parameters = sum(p.numel() for p in MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).parameters())
    text = config.get_text_config()
    return ModelSize(
        parameters=parameters,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
    )


def trainer_bytes(
    size: ModelSize, *, shards: int, tokens: int, width: int, checkpointing: bool, trained: int | None = None
) -> dict[str, int]:
    """Peak memory of one rank by what it is for; an estimate from above.

    With N parameters, R shards, T tokens of a micro-batch, `width` bytes a number (2 in bfloat16), L layers, hidden size H,
    MLP size I, vocabulary V:

    - states: (16 N_trained + width N) / R: float32 master, gradients and two Adam moments, and the weights that are computed
      with
    - gathered: width x min(N, 10^9): ZeRO-3 gathers no more at a time
    - activations: width x L T H with gradient checkpointing (the input of every layer); without, all of every layer
    - layer: width x T x (12 H + 7 I): one layer while its gradient is computed
    - head: (width + 4) V H + 1 GiB: the gathered head, its float32 gradient, tiles of logits
    - runtime: 3 GiB: CUDA context, NCCL, fragments

    Args:
        shards: ranks that share the states: all under ZeRO-3, 1 otherwise.
        trained: parameters that are trained; default: all.
    """
    trained = size.parameters if trained is None else trained
    layer = width * tokens * (12 * size.hidden + 7 * size.intermediate)
    kept = width * tokens * size.hidden if checkpointing else layer // 2
    return {
        "states": (16 * trained + width * size.parameters) // shards,
        "gathered": int(width * min(size.parameters, _LIVE_PARAMETERS)) if shards > 1 or width == 2 else 0,
        "activations": size.layers * kept,
        "layer": layer,
        "head": (width + 4) * size.vocabulary * size.hidden + GIB,
        "runtime": _RUNTIME_BYTES,
    }


def server_bytes(size: ModelSize, *, width: int, context: int) -> dict[str, int]:
    """The least that a server takes: weights, the KV cache of one sequence of `context` tokens, vLLM's own needs."""
    tokens = (context // _BLOCK + 1) * _BLOCK
    return {
        "weights": width * size.parameters,
        "KV cache of one sequence": 2 * width * size.layers * size.kv_heads * size.head_dim * tokens,
        "runtime": _SERVER_RUNTIME_BYTES,
    }


@dataclass(frozen=True)
class Sharing:
    """A GPU that a rank and a server share.

    Attributes:
        gpu: its index on this machine; it is also the local rank's.
        card: its memory, bytes.
        server: share of it that the server gets, 0-1.
        kv_cache: of the server, bytes.
        trainer_needs: bytes, see `trainer_bytes`.
    """

    gpu: int
    card: int
    server: float
    kv_cache: int
    trainer_needs: int

    @property
    def trainer(self) -> float:
        """Share that is the trainer's."""
        return 1 - self.server - _MARGIN

    def describe(self) -> str:
        return (
            f"it shares GPU {self.gpu} with a rank: {self.server:.2f} of {self.card / GIB:.0f} GiB = "
            f"{self.server * self.card / GIB:.0f} GiB for the server (KV cache {self.kv_cache / GIB:.1f}), about "
            f"{self.trainer_needs / GIB:.0f} GiB for the rank"
        )

    def hold_trainer(self) -> None:
        """On the rank that shares: no more of the GPU than the server leaves, so that a server that dies can start again."""
        torch.cuda.set_per_process_memory_fraction(self.trainer - _OUTSIDE_BYTES / self.card, torch.cuda.current_device())


def share_gpu(
    gpu: int, card: int, trainer: dict[str, int], server: dict[str, int], *, asked: float | None, most: float, sequences: int
) -> Sharing:
    """Split a GPU: the server gets what it needs and most of what is left over, or `asked`.

    Args:
        card: memory of the GPU, bytes.
        trainer, server: needs, from `trainer_bytes` and `server_bytes`.
        asked: `shared_gpu_memory_utilization`, which wins over the estimates.
        most: `vllm_gpu_memory_utilization`.
        sequences: `server_max_num_seqs`; a KV cache for more full ones would never be used.

    Raises:
        ConfigError: the two do not fit on one GPU, with what each needs and what would help.
    """
    needs, least, both = sum(trainer.values()), sum(server.values()), (1 - _MARGIN) * card
    sure = needs
    if asked is None:
        share = math.floor(100 * min((least + _SPARE_FOR_SERVER * (both - needs - least)) / card, most)) / 100
    else:  # by someone who knows better than the estimates; of these, the optimizer states are exact
        share, sure = asked, trainer["states"] + _OUTSIDE_BYTES
    if min(share * card, both - sure) < least:
        raise ConfigError(
            f"One GPU of {card / GIB:.0f} GiB does not hold a training rank and its rollout server. The rank needs about "
            f"{needs / GIB:.0f} GiB ({_terms(trainer)}). The server needs {least / GIB:.0f} GiB ({_terms(server)}), and would "
            f"get {max(share, 0.0):.2f} of the GPU. Leave GPUs to servers (--num_processes 4 --managed_servers 4 on 8 GPUs), "
            "lower --max_tokens_per_micro_batch (not below one full sequence), use more ranks, or, if you know better, set "
            "--shared_gpu_memory_utilization."
        )
    if both - share * card < sure:
        raise ConfigError(
            f"shared_gpu_memory_utilization={share} leaves {max(both - share * card, 0) / GIB:.1f} GiB of the GPU to the rank, "
            f"and optimizer states and CUDA alone take {sure / GIB:.1f}. Use at most "
            f"{math.floor(100 * (both - sure) / card) / 100:.2f}, or leave it out."
        )
    one = server["KV cache of one sequence"]
    return Sharing(gpu, card, share, min(int(share * card) - least + one, sequences * one), needs)


def _terms(needs: dict[str, int]) -> str:
    return ", ".join(f"{name} {amount / GIB:.1f}" for name, amount in needs.items())
