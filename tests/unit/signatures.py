"""Signatures as text, in this process and in those that import what this one must not."""

import inspect
from collections.abc import Callable


def plain(function: Callable) -> str:
    """`(parameters with their defaults)`, without annotations."""
    signature, empty = inspect.signature(function), inspect.Parameter.empty
    parameters = [parameter.replace(annotation=empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
