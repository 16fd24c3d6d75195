r"""Whether two short expressions are equal, without evaluating model text as Python.

sympy's `parse_expr` works in two steps: it rewrites the text token by token into a Python expression (`2x` becomes
`Integer(2)*Symbol('x')`), and then calls `eval` on it. The first step is kept, because the reference's verdicts depend on its
details; the second is replaced by a walk over the syntax tree that knows five operators, a dozen names and nothing else. So
there are no attributes, no strings outside `Symbol('x')`, no keywords, and numbers have a bounded size.

What is left can still take long (`simplify`) or much memory: `equal` belongs into a worker process of `pool`.
"""

import ast
import builtins
import operator
import re
import types
from collections.abc import Callable
from tokenize import TokenError
from typing import Any

import sympy
from sympy.parsing.sympy_parser import implicit_multiplication_application, standard_transformations, stringify_expr

MAX_BITS = 2**16  # of an integer power; about 20,000 digits
_BITS_PER_DIGIT = 3.33
MAX_FACTORIAL = 5000  # about 54,000 bits
# All that sympy, `ast` and the walk raise on text that is no expression. The reference takes every error for "not equal".
_REFUSALS = (
    SyntaxError, TokenError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, NotImplementedError,
    RecursionError,
)  # fmt: skip

_DIGITS = re.compile("0+|[1-9][0-9]*")
_TRANSFORMATIONS = (*standard_transformations, implicit_multiplication_application)
# The names that `parse_expr` would know. The rewriting looks up whether a name is known and callable; nothing is called.
_KNOWN_NAMES = {name: getattr(sympy, name) for name in sympy.__all__} | {
    name: value for name, value in vars(builtins).items() if isinstance(value, types.BuiltinFunctionType)
}


def equal(truth: str, given: str) -> bool:
    """Whether the difference of two expressions in plain form simplifies to 0; text that is no expression equals nothing."""
    try:
        return sympy.simplify(to_sympy(f"({truth})-({given})")) == 0
    except _REFUSALS:
        return False


def to_sympy(text: str) -> sympy.Basic:
    """The sympy object that a line of calculator text denotes; `^` is a power, `2x` a product.

    Raises:
        ValueError: for syntax outside arithmetic, an unknown name, or a number above the bounds.
        SyntaxError, TokenError, TypeError and others: as sympy and Python's parser raise them on malformed text.
    """
    code = stringify_expr(text.replace("^", "**"), {}, _KNOWN_NAMES, _TRANSFORMATIONS)
    return _value(ast.parse(code.strip(" \t"), mode="eval").body)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        return _SIGNS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.Call) and not node.keywords:
        return _call(node)
    raise ValueError(f"{type(node).__name__} is not arithmetic: an answer may use + - * / **, numbers, letters and roots")


def _call(node: ast.Call) -> Any:
    if isinstance(node.func, ast.Name) and node.func.id in _LITERALS:
        kind, make = _LITERALS[node.func.id]
        return make(*(_literal(argument, kind) for argument in node.args))
    if isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        return _FUNCTIONS[node.func.id](*map(_value, node.args))
    if isinstance(node.func, ast.Call) and isinstance(node.func.func, ast.Name) and node.func.func.id == "Function":
        return _call(node.func)(*map(_value, node.args))  # f(x) of an unknown f
    raise ValueError("a call of something that is neither a number, a letter nor one of the functions known here")


def _literal(node: ast.expr, kind: type) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is kind:
        return node.value
    if isinstance(number := _value(node), sympy.Integer):
        return number  # repeating decimals are written as numbers of numbers
    raise ValueError(f"{type(node).__name__} instead of a literal of type {kind.__name__}")


def _digits(text: str) -> sympy.Integer:
    """The number behind a letter, `x2`. sympy would take the string through `sympify`, which is `eval`."""
    if not _DIGITS.fullmatch(text):
        raise ValueError("a number with leading zeros, or in other than ASCII digits, is not Python's")
    return sympy.Integer(int(text))


def _float(text: str) -> sympy.Float:
    """A decimal number. sympy computes its power of ten exactly before it rounds."""
    if abs(int(text.lower().partition("e")[2] or 0)) * _BITS_PER_DIGIT > MAX_BITS:
        raise ValueError(f"a decimal exponent of more than {MAX_BITS} bits is not computed")
    return sympy.Float(text)


def _power(base: Any, exponent: Any) -> Any:
    if exponent.is_Rational:
        bits = max([1, *(max(abs(number.p), number.q).bit_length() for number in base.atoms(sympy.Rational))])
        if abs(exponent) * bits > MAX_BITS:
            raise ValueError(f"a power of more than {MAX_BITS} bits is not computed")
    return base**exponent


def _bounded(factorial: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def compute(argument: Any) -> Any:
        if argument.is_number and abs(argument) > MAX_FACTORIAL:
            raise ValueError(f"a factorial above {MAX_FACTORIAL} is not computed")
        return factorial(argument)

    return compute


_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: _power,
}
_SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_LITERALS = {
    "Symbol": (str, sympy.Symbol),
    "Function": (str, sympy.Function),
    "Integer": (int, sympy.Integer),
    "Float": (str, _float),
    "Rational": (int, sympy.Rational),  # repeating decimals, 0.[3]
    "Number": (str, _digits),
}
# With at most two letters besides sqrt and frac, no other name of sympy is worth having.
_CONSTANTS = {"pi": sympy.pi, "oo": sympy.oo, "zoo": sympy.zoo, "nan": sympy.nan, "I": sympy.I}
_FUNCTIONS = {
    "sqrt": sympy.sqrt,
    "ln": sympy.ln,
    "re": sympy.re,
    "im": sympy.im,
    "frac": sympy.frac,
    "factorial": _bounded(sympy.factorial),
    "factorial2": _bounded(sympy.factorial2),
}
