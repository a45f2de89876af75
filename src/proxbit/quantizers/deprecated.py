"""The constructors that `Function` has taken the place of, with the arguments they had."""

import re
from collections.abc import Callable

from torch import Tensor

from proxbit.quantizers.functions import Function, Mu, name_of

__all__ = ["proximal_map", "surrogate", "transform"]

Plain = Callable[[Tensor, Mu], Tensor]


def _right_side(formula: str) -> str:
    """Of an equation such as "P(w) = w / 2"; other formulas are kept as they are."""
    left, equals, right = formula.partition(" = ")
    return right if equals and left.removeprefix("T'").removeprefix("T") in ("(p)", "P(w)", "F(w)", "B(w)") else formula


def proximal_map(name: str, function: Plain, formula: str, source: str) -> Function:
    """`ProximalMap`."""
    return Function(name, function, _right_side(formula), source, non_decreasing=True)


def transform(
    name: str, function: Plain, derivative: Plain, formula: str, derivative_formula: str, source: str
) -> Function:
    """`Transform`."""
    slope = Function(f"{name} slope", derivative, _in_w(derivative_formula), source)
    return Function(name, function, _in_w(formula), source, derivative=slope)


def _in_w(formula: str) -> str:
    return re.sub(r"\bp\b", "w", _right_side(formula))


def surrogate(function: Plain, formula: str) -> Function:
    """`Surrogate`."""
    return Function(name_of(function), function, _right_side(formula))
