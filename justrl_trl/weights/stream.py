"""The policy as a stream of full tensors: gathered under ZeRO-3, adapters merged, checkpoint names."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer


@dataclass(frozen=True)
class WireTensor:
    """Name, dtype on the wire and full shape of one parameter."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class PolicyWeights:
    """The policy as a stream of full `(name, tensor)` pairs under the names of its checkpoint; LoRA adapters merged in.

    Iterating is a collective under ZeRO-3: every rank must run through the whole stream (`drain()` finishes an abandoned
    pass). A tensor is valid until the next one is asked for: it may be the parameter itself, which is sharded again then.
    `metadata()` describes the same stream without moving anything.
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
        adapted = _adapted_modules(self._model)
        merged: dict[int, torch.Tensor] = {}  # of one adapted module
        for name, parameter in self._named():
            module = adapted.get(id(parameter))
            if module is None:
                with _gathered([parameter]):
                    yield name, parameter.detach().to(self.dtype).contiguous()
                continue
            if id(parameter) not in merged:
                merged = _merged(module, self.dtype)
            yield name, merged.pop(id(parameter))

    def _named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        if not isinstance(self._model, PeftModel):
            yield from self._model.named_parameters()
            return
        for name, parameter in self._model.named_parameters():
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if self._model.prefix not in name and "original_module" not in name:
                yield name.replace("modules_to_save.default.", ""), parameter


def _adapted_modules(model: torch.nn.Module) -> dict[int, BaseTunerLayer]:
    """The adapted module that a base parameter, by its id, belongs to."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return {id(parameter): layer for layer in layers for parameter in layer.get_base_layer().parameters()}


@torch.no_grad()
def _merged(layer: BaseTunerLayer, dtype: torch.dtype) -> dict[int, torch.Tensor]:
    """Copies of the base parameters of one adapted module with its adapter merged in, by their ids.

    The base itself ends bit by bit as it was: subtracting what was added would leave a rounding error of every push in it, and
    in bfloat16 those add up. Under ZeRO-3 one rank's gathered parameters are its partition, so that holds there too.
    """
    base = list(layer.get_base_layer().parameters())
    with _gathered(list(layer.parameters())):
        kept = [parameter.detach().clone() for parameter in base]
        layer.merge()
        try:
            return {id(parameter): parameter.detach().to(dtype, copy=True).contiguous() for parameter in base}
        finally:
            layer.unmerge()
            for parameter, before in zip(base, kept, strict=True):
                parameter.copy_(before)


def _gathered(parameters: list[torch.nn.Parameter]):
    """ZeRO-3: the full parameters on every rank inside the context; otherwise nothing to do."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
