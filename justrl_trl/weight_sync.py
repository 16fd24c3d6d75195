"""Trainer -> server: push the policy, and prove that it arrived.

After every rollout step the policy's weights travel from rank 0 to the rollout server: gathered parameter by parameter under
ZeRO-3, broadcast over gloo (CPU, or a GPU shared with the trainer) or vLLM's NCCL engine, stamped with a version. Then two
checks: the version is read back, and the log-probabilities of fixed tokens are compared between trainer and server. Stale or
scrambled weights show there at once; "watch the reward" is not a test.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator
from peft import PeftModel

from justrl_trl.collectives import raise_together
from justrl_trl.gloo_group import GlooGroup
from justrl_trl.packing import Sequence
from justrl_trl.rollout import RolloutClient
from justrl_trl.server import ServerError
from justrl_trl.vllm_plugin import BACKEND as GLOO_BACKEND
from justrl_trl.vllm_plugin import GlooInitInfo, GlooUpdateInfo


@dataclass(frozen=True)
class WireTensor:
    """Name, dtype on the wire and full shape of one parameter."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class PolicyWeights:
    """The policy as a stream of full `(name, tensor)` pairs under the names of its checkpoint; LoRA adapters merged in.

    Iterating is a collective under ZeRO-3: every rank must run through the whole stream (`drain()` finishes an abandoned
    pass). `metadata()` describes the same stream without moving anything.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype):
        self._model, self.dtype = model, dtype
        self._pass: Iterator[tuple[str, torch.Tensor]] | None = None

    def metadata(self) -> list[WireTensor]:
        shapes = ((name, getattr(p, "ds_shape", p.shape)) for name, p in self._named())
        return [WireTensor(name, self.dtype, tuple(shape)) for name, shape in shapes]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._pass = self._stream()
        return self._pass

    def drain(self) -> None:
        """Run the latest pass to its end, so that the other ranks are not left waiting in a gather."""
        for _ in self._pass or ():
            pass

    def _stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        adapted = isinstance(self._model, PeftModel)
        with self._merged_adapter():
            for name, parameter in self._named():
                with nullcontext() if adapted else _gathered([parameter]):  # merged weights are gathered already
                    yield name, parameter.detach().to(self.dtype).contiguous()

    def _named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        if not isinstance(self._model, PeftModel):
            yield from self._model.named_parameters()
            return
        for name, parameter in self._model.named_parameters():
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if self._model.prefix not in name and "original_module" not in name:
                yield name.replace("modules_to_save.default.", ""), parameter

    @contextmanager
    def _merged_adapter(self):
        """LoRA only: fold the adapter into the base weights for the length of the stream (needs them all gathered)."""
        if not isinstance(self._model, PeftModel):
            yield
            return
        with _gathered(list(self._model.parameters())):
            self._model.merge_adapter()
            try:
                yield
            finally:
                self._model.unmerge_adapter()


def _gathered(parameters: list[torch.nn.Parameter]):
    """ZeRO-3: the full parameters on every rank inside the context; otherwise nothing to do."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


class _Background(threading.Thread):
    """One call in a daemon thread: an HTTP call that returns only when the broadcast beside it has been joined."""

    def __init__(self, call: Callable[[], None]):
        super().__init__(daemon=True)
        self._call, self.error = call, None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except Exception as error:  # handed to the main thread by `finish`
            self.error = error

    def finish(self) -> None:
        self.join()
        if self.error is not None:
            raise self.error


class GlooSender:
    """Rank 0's end of `GlooGroup`: one server, its workers, one generation at a time."""

    def __init__(self, client: RolloutClient, address: str, port: int, timeout_seconds: float):
        self._client, self._address, self._port, self._timeout = client, address, port, timeout_seconds
        self._generation = 0
        self._group: GlooGroup | None = None
        self._manifest: list[WireTensor] = []

    def connect(self, weights: PolicyWeights) -> None:
        """Form the group of this trainer and the server's workers; they check that these weights fit their model."""
        self._generation += 1
        workers = self._client.world_size()
        self._manifest = manifest = weights.metadata()
        self._group = GlooGroup(self._address, self._port, 0, workers + 1, self._timeout)
        info = GlooInitInfo(
            address=self._address,
            port=self._group.port,
            rank_offset=1,
            world_size=workers + 1,
            timeout_seconds=self._timeout,
            generation=self._generation,
            names=[w.name for w in manifest],
            dtype_names=[str(w.dtype).removeprefix("torch.") for w in manifest],
            shapes=[list(w.shape) for w in manifest],
        )
        joined = _Background(self._group.join)
        self._client.init_weight_transfer_engine(asdict(info))  # raises at once if the server refuses
        joined.finish()

    def send(self, weights: PolicyWeights, version: str) -> None:
        """One push; the model of the server changes only in the final call, when everything has arrived."""
        self._client.start_weight_update()
        receiving = _Background(lambda: self._client.update_weights(asdict(GlooUpdateInfo(self._generation))))
        for expected, (name, tensor) in zip(self._manifest, weights, strict=True):
            if WireTensor(name, tensor.dtype, tuple(tensor.shape)) != expected:  # gloo aborts a process on a wrong size
                raise ServerError(f"parameter {name} {tensor.dtype} {tuple(tensor.shape)} was announced as {expected}")
            if receiving.error is not None:
                break  # refused: do not broadcast to a worker that is not listening
            self._group.broadcast(tensor.cpu())
        receiving.finish()
        self._client.finish_weight_update(version)


class NcclSender:
    """vLLM's own packed NCCL engine behind the same two calls; imports vLLM, so only where there is a GPU."""

    def __init__(self, client: RolloutClient, address: str, port: int, timeout_seconds: float):
        self._client, self._address, self._port = client, address, port
        self._engine = None
        self._version = ""

    def connect(self, weights: PolicyWeights) -> None:
        """Deferred to the first `send`: vLLM's engine wants its weight source when it joins."""
        self._engine = None

    def send(self, weights: PolicyWeights, version: str) -> None:
        self._version = version
        if self._engine is None:
            self._engine = self._join(weights)
        self._engine.source = weights
        self._engine.send_weights()

    def _join(self, weights: PolicyWeights):
        from trl.trainer.utils import _find_free_port
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info = NCCLTrainerInitInfo(
            master_address=self._address,
            master_port=self._port or _find_free_port(),
            world_size=self._client.world_size() + 1,
            rank=0,
        )
        return WeightTransferTrainerFactory.trainer_init(info, client=self, source=weights)

    # the four calls that vLLM's engine makes on its client; the last one adds what vLLM's engine leaves out
    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self._client.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self._client.start_weight_update()

    def update_weights(self, update_info: dict) -> None:
        self._client.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._client.finish_weight_update(self._version)


class WeightSync:
    """Pushes the policy and proves it; every method is called on every rank.

    Args:
        accelerator: of the trainer.
        model: the unwrapped policy.
        client: rank 0's client; None on the other ranks.
        address, port: where rank 0 hosts the broadcast group; port 0 picks a free one.
        timeout_seconds: deadline of the join and of each broadcast.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        client: RolloutClient | None,
        *,
        address: str,
        port: int,
        timeout_seconds: float,
    ):
        self._accelerator, self._client = accelerator, client
        self.version: str | None = None
        # ranks other than 0 never send, so their dtype does not matter
        self._weights = PolicyWeights(model, torch.bfloat16)
        error = None
        if accelerator.is_main_process:
            try:
                config = client.vllm_config()
                self._weights.dtype = getattr(torch, config["model_config"]["dtype"].removeprefix("torch."))
                backend = (config.get("weight_transfer_config") or {}).get("backend")
                self._sender = _sender_for(backend, client.url)(client, address, port, timeout_seconds)
                self._sender.connect(self._weights)
            except Exception as caught:  # every rank must hear of it
                error = caught
        raise_together(error, accelerator)

    def push(self, version: str) -> None:
        """Send the current policy and stamp it `version`; read the stamp back.

        Raises:
            ServerError (rank 0) / RuntimeError (others): if any part of it failed; the server keeps its old weights.
        """
        error = None
        if self._accelerator.is_main_process:
            iter(self._weights)  # a pass to drain, even if `send` fails before it begins one
            try:
                self._sender.send(self._weights, version)
                served = self._client.weight_version()
                if served != version:
                    raise ServerError(f"{self._client.url} reports weight version {served!r} after a push of {version!r}.")
            except Exception as caught:
                error = caught
            self._weights.drain()
        else:
            for _ in self._weights:
                pass
        raise_together(error, self._accelerator)
        self.version = version

    def gap(self, sequences: list[Sequence], logps: torch.Tensor) -> tuple[float, float]:
        """Compare trainer and server on the responses of fixed sequences.

        Args:
            sequences: prompts with responses, the same on all ranks.
            logps: `(N,)`, the trainer's log-probabilities of all their response tokens in order, temperature 1.

        Returns:
            Largest and mean |log p_trainer - log p_server|, on every rank.
        """
        error, gap = None, torch.zeros(2, device=self._accelerator.device)
        if self._accelerator.is_main_process:
            try:
                served = [self._client.prompt_logprobs(s.ids.tolist())[s.prompt_length - 1 :] for s in sequences]
                difference = (logps.float().cpu() - torch.tensor([value for part in served for value in part])).abs()
                gap.copy_(torch.stack([difference.max(), difference.mean()]))
            except Exception as caught:
                error = caught
        raise_together(error, self._accelerator)
        largest, mean = self._accelerator.reduce(gap, "sum").tolist()
        return largest, mean


def _sender_for(backend: str | None, url: str):
    senders = {GLOO_BACKEND: GlooSender, "nccl": NcclSender}
    if backend not in senders:
        raise ServerError(
            f"The server at {url} has weight transfer backend {backend!r}; this trainer can feed {sorted(senders)}. Start it "
            f'with --weight-transfer-config \'{{"backend": "{GLOO_BACKEND}"}}\' (any machine) or \'{{"backend": "nccl"}}\' '
            "(a GPU of its own)."
        )
    return senders[backend]
