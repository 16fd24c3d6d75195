"""Fields of the argument classes: default, help text, and the bounds that are checked and shown by `--help`."""

import dataclasses
import math
from collections.abc import Sequence

from justrl_trl.errors import ConfigError

_FOR_ARGPARSE = ("help", "choices", "aliases")


class _Metadata(dict):
    """Field metadata whose copy is what argparse understands: `HfArgumentParser` passes a copy of it to `add_argument`."""

    def copy(self) -> dict:
        return {key: value for key, value in self.items() if key in _FOR_ARGPARSE}


def knob(
    default,
    help: str,
    *,
    min: float | None = None,
    above: float | None = None,
    max: float | None = None,
    choices: Sequence[str] | None = None,
):
    """A dataclass field for an option of that name.

    Args:
        default: value without the option; None passes every bound.
        help: one or two sentences for `--help`.
        min, max: inclusive bounds; an integer `min` also asks for an integer.
        above: exclusive lower bound.
        choices: all values that are allowed.
    """
    bounds = {name: value for name, value in (("min", min), ("above", above), ("max", max)) if value is not None}
    shown = f" {_words(bounds).capitalize()}." if bounds else ""
    metadata = _Metadata(help=help + shown, **bounds)
    if choices is not None:
        metadata["choices"] = list(choices)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_bounds(arguments: object) -> None:
    """Check every field of a dataclass made of knobs.

    Raises:
        ConfigError: naming the field, what it must be and what it is.
    """
    for field in dataclasses.fields(arguments):
        check_value(field.name, getattr(arguments, field.name), field.metadata)


def check_value(name: str, value: object, bounds) -> None:
    """Check one value against `min`, `above`, `max` and `choices` of `bounds`; None passes."""
    if value is None:
        return
    choices = bounds.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    limits = {key: bounds[key] for key in ("min", "above", "max") if key in bounds}
    if not limits:
        return
    kinds = int if isinstance(limits.get("min"), int) else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool) and not math.isnan(value)
    fits = fits and limits.get("min", -math.inf) <= value <= limits.get("max", math.inf)
    if not fits or not value > limits.get("above", -math.inf):
        number = "an integer" if kinds is int else "a number"
        raise ConfigError(f"{name} must be {number}{' of' if 'min' in limits else ''} {_words(limits)}, got {value!r}.")


def _words(limits: dict[str, float]) -> str:
    words = {"min": "at least {}", "above": "above {}", "max": "at most {}"}
    return " and ".join(words[key].format(limits[key]) for key in words if key in limits)
