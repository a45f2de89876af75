"""Levels with the gradient of something else, and what is clipped, for activations and attention."""

from typing import Any

import torch
from torch import Tensor

from proxbit.quantizers import QuantizerPair

__all__ = ["binarize_units", "clip", "straight_through"]


class _Binarize(torch.autograd.Function):
    """F of a pair, or the levels that are given; backward: B of the pair."""

    @staticmethod
    def forward(ctx: Any, units: Tensor, levels: Tensor, mu: Tensor, pair: QuantizerPair, hard: bool) -> Tensor:
        ctx.save_for_backward(units, mu.clone())
        ctx.pair = pair
        return levels.to(units.dtype) if hard else pair.forward(units, mu).to(units.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        units, mu = ctx.saved_tensors
        return (ctx.pair.backward(units, mu) * grads[0]).to(units.dtype), None, None, None, None


def binarize_units(units: Tensor, levels: Tensor, mu: Tensor, pair: QuantizerPair, hard: bool = True) -> Tensor:
    """Two levels with the gradient of a pair.

    Args:
        units: numbers whose levels are -1 and +1; any shape.
        levels: which of the two is taken, same shape.
        mu: sharpness.
        pair: F and B.
        hard: levels; without, F of the units.

    Returns:
        Same shape and dtype as `units`; backward: B of the units.
    """
    result: Tensor = _Binarize.apply(units, levels, mu, pair, hard)
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, units: Tensor) -> Tensor:
        ctx.dtype = units.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, grads[0].to(ctx.dtype)


def straight_through(values: Tensor, units: Tensor) -> Tensor:
    """The values, to the last bit, with the gradient of the units.

    Args:
        values: without a gradient; any shape.
        units: what they were made of, same shape.
    """
    result: Tensor = _StraightThrough.apply(values, units)
    return result


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return grads[0].masked_fill(x != x.clamp(*ctx.bounds), 0), None, None


def clip(x: Tensor, low: float, high: float) -> Tensor:
    r"""What lies between two bounds, and the bounds.

    Formula:
        min(max(x, low), high);   backward: 1 where low \le x \le high, else 0. Of `Tensor.clamp` it is 0 at the bounds
        themselves from torch 2.14 on, and activations of few bits are often just there.

    Args:
        x: any shape, floating point; NaN stays, with the gradient 0.
        low: the lower bound.
        high: the upper one.

    Returns:
        Same shape and dtype as `x`.
    """
    result: Tensor = _Clip.apply(x, low, high)
    return result
