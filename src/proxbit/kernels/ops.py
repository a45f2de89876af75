"""The operators `torch.ops.proxbit.*`: schema, shapes, gradient and FLOP formula; kernels register behind them."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from proxbit.errors import PackedFormatError
from proxbit.kernels import reference
from proxbit.packing import packed_columns

__all__ = ["linear_w1", "linear_w1_kernel", "unpack_weight"]

_LIBRARY = torch.library.Library("proxbit", "DEF")
_LIBRARY.define("linear_w1(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")
_LIBRARY.define("linear_w1_grad_input(Tensor grad, Tensor weight, Tensor scale, int columns) -> Tensor")
_LIBRARY.define("unpack_weight(Tensor weight, Tensor scale, int columns) -> Tensor")


def _check_shapes(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    if weight.dtype != torch.uint8 or weight.dim() != 2:
        raise PackedFormatError(
            f"linear_w1: packed weights are uint8 [rows, bytes], not {weight.dtype} {list(weight.shape)}."
        )
    for name, numbers in (("scale", scale), ("bias", bias)):
        if numbers is not None and numbers.shape != weight.shape[:1]:
            raise PackedFormatError(
                f"linear_w1: {name} must be one number a row, [{weight.shape[0]}], not {list(numbers.shape)}."
            )
    if packed_columns(x.shape[-1]) != weight.shape[1]:
        raise PackedFormatError(
            f"linear_w1: an input of width {x.shape[-1]} needs {packed_columns(x.shape[-1])} bytes a row, "
            f"the packed weight has {weight.shape[1]}."
        )
    if not x.dtype.is_floating_point:
        raise PackedFormatError(f"linear_w1: the input must be floating point, not {x.dtype}.")


# The ops have their own rule for the precision of their sums: autocast must not reach into the torch code inside.
def _linear_w1(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _check_shapes(x, weight, scale, bias)
    with torch.autocast(x.device.type, enabled=False):
        return reference.linear_w1(x, weight, scale, bias)


def _linear_w1_grad_input(grad: Tensor, weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    with torch.autocast(grad.device.type, enabled=False):
        return reference.linear_w1_grad_input(grad, weight, scale, columns)


_LIBRARY.impl("linear_w1", _linear_w1, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_w1_grad_input", _linear_w1_grad_input, "CompositeExplicitAutograd")
_LIBRARY.impl("unpack_weight", reference.unpack_weight, "CompositeExplicitAutograd")


@torch.library.register_fake("proxbit::linear_w1", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _check_shapes(x, weight, scale, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("proxbit::linear_w1_grad_input", lib=_LIBRARY)
def _(grad: Tensor, weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], columns))


@torch.library.register_fake("proxbit::unpack_weight", lib=_LIBRARY)
def _(weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    return scale.new_empty((weight.shape[0], columns))


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, scale, bias = inputs
    ctx.save_for_backward(weight, scale)
    ctx.columns = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
    """Gradients for the input and the bias; bits and scales are what they are."""
    weight, scale = ctx.saved_tensors
    grad_bias = None if ctx.bias_dtype is None else grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return torch.ops.proxbit.linear_w1_grad_input(grad, weight, scale, ctx.columns), None, None, grad_bias


torch.library.register_autograd("proxbit::linear_w1", _backward, setup_context=_save_for_backward, lib=_LIBRARY)


@register_flop_formula(torch.ops.proxbit.linear_w1)
def _(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * math.prod(x_shape) * weight_shape[0])


@register_flop_formula(torch.ops.proxbit.linear_w1_grad_input)
def _(grad_shape: Any, weight_shape: Any, scale_shape: Any, columns: int, *args: Any, **kwargs: Any) -> int:
    return int(2 * math.prod(grad_shape) * columns)


def linear_w1(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference.linear_w1`, on the fastest kernel there is for these tensors."""
    result: Tensor = torch.ops.proxbit.linear_w1.default(x, weight, scale, bias)
    return result


def unpack_weight(weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    """`reference.unpack_weight`, on the fastest kernel there is for these tensors."""
    result: Tensor = torch.ops.proxbit.unpack_weight.default(weight, scale, columns)
    return result


def linear_w1_kernel(weight: Tensor) -> str:
    """The name of the kernel that `linear_w1` runs for this packed weight."""
    return "reference"
