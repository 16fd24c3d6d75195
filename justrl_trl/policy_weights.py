"""The policy as a stream of full tensors: gathered under ZeRO-3 one by one, adapters merged, names of the checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel


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
