"""Plain torch implementations of the ops: what every other kernel is measured against."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from proxbit.errors import PackedFormatError
from proxbit.packing import pack_signs, unpack_signs

__all__ = [
    "Norm",
    "linear_w1",
    "linear_w1_grad_input",
    "linear_w1a1",
    "linear_w1a8",
    "pack_signs",
    "quantize_activations",
    "unpack_signs",
    "unpack_weight",
    "with_levels",
    "without_levels",
]

INT8_PEAK = 127
# An fp32 sum of integers is exact up to 2^24.
_EXACT = 2**24
# Below this a row counts as zero: 127 over its peak would be out of the range of fp32.
_SMALLEST_PEAK = 1e-30


class Norm(NamedTuple):
    r"""A layer normalization in front of a linear layer: (x - mean) / \sqrt{variance + eps} weight + bias, row by row.

    Attributes:
        weight: `[I]`.
        bias: `[I]`.
        eps: added to the variance.
    """

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """`x`, `[..., I]`, normalized; in fp32, or fp64 if it is."""
        dtype = _accumulation_dtype(x.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return torch.nn.functional.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, self.eps)


def _norm_of(weight: Tensor | None, bias: Tensor | None, eps: float) -> Norm | None:
    """From the arguments of an operator: None if there is no normalization.

    Raises:
        PackedFormatError: if only one of weight and bias is given.
    """
    if (weight is None) != (bias is None):
        raise PackedFormatError("norm_weight and norm_bias come together.")
    return None if weight is None or bias is None else Norm(weight, bias, eps)


def without_levels(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the arguments of the schema: `linear(x, weight, scale, bias, gelu=, norm=)`."""

    def run(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        gelu: bool = False,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        norm_eps: float = 0.0,
    ) -> Tensor:
        return linear(x, weight, scale, bias, gelu=gelu, norm=_norm_of(norm_weight, norm_bias, norm_eps))

    return run


def with_levels(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the arguments of the schema: `linear(x, weight, scale, bias, levels, gelu=, norm=)`."""

    def run(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        levels: Tensor | None = None,
        gelu: bool = False,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        norm_eps: float = 0.0,
    ) -> Tensor:
        return linear(x, weight, scale, bias, levels, gelu=gelu, norm=_norm_of(norm_weight, norm_bias, norm_eps))

    return run


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _finish(result: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    if bias is not None:
        result = result + bias.to(result.dtype)
    return torch.nn.functional.gelu(result) if gelu else result


def linear_w1(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, gelu: bool = False, norm: Norm | None = None
) -> Tensor:
    r"""A linear layer with packed 1-bit weights.

    Formula:
        y[..., o] = scale[o] \sum_i (+-1)[o, i] x[..., i] + bias[o], summed in fp32 (fp64 for fp64 inputs).

    Args:
        x: `[..., I]`, fp16, bf16, fp32 or fp64.
        weight: `[O, ceil(I / 8)]`, uint8, see `packing.layout`.
        scale: `[O]`, floating point.
        bias: `[O]` or None.
        gelu: return GELU(y) = y Phi(y), before it is rounded to the dtype of `x`.
        norm: normalizes `x` first, without rounding to its dtype.

    Returns:
        `[..., O]`, dtype of `x`.
    """
    dtype = _accumulation_dtype(x.dtype)
    values = x.to(dtype) if norm is None else norm(x)
    result = torch.nn.functional.linear(values, unpack_signs(weight, x.shape[-1], dtype)) * scale.to(dtype)
    return _finish(result, bias, gelu).to(x.dtype)


def quantize_activations(x: Tensor, grid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Symmetric int8 quantization of every row (token) by its own largest value, or on a grid that is given.

    Formula:
        step = \max_i |x[..., i]| / 127,   q = round(x 127 / \max|x|), halves to even
        on a grid: q = round(clip(x / step, lowest, highest))

    Args:
        x: `[..., I]`, floating point; worked on in fp32, on a grid in fp64 if it is.
        grid: `[3]`: step, lowest code, from -127 to 0, and highest, from 0 to 127; or None.

    Returns:
        q, `[..., I]`, whole numbers from -127 to 127, and step, `[..., 1]`, both in fp32. A row of zeros, or of less
        than 1e-30, has step 0; one with NaN or infinity has step NaN. On a grid only one with NaN has.
    """
    if grid is not None:
        wide = x.to(_accumulation_dtype(x.dtype))
        step, lowest, highest = grid.to(wide.dtype)
        units = wide / step
        unordered = units.isnan()
        clipped = units.clamp(lowest.clamp(-INT8_PEAK, 0), highest.clamp(0, INT8_PEAK))
        q = torch.where(unordered, 0.0, clipped).round().float()
        return q, torch.where(unordered.any(dim=-1, keepdim=True), torch.nan, step).float()
    x = x.float()
    # Of no inputs at all the largest is 0.
    peak = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    valid = torch.isfinite(peak) & (peak >= _SMALLEST_PEAK)
    # As a tensor: with a number, torch divides through reciprocals, which round once more.
    top = torch.full_like(peak, INT8_PEAK)
    q = torch.where(valid, (x * (top / peak)).round(), 0.0)
    step = torch.where(valid, peak / top, torch.where(torch.isfinite(peak), 0.0, torch.nan))
    return q, step


def _integer_sums(values: Tensor, weight: Tensor, peak: int) -> Tensor:
    """Exact sums of whole numbers up to `peak`, in fp32."""
    dtype = torch.float32 if values.shape[-1] * peak <= _EXACT else torch.float64
    return torch.nn.functional.linear(values.to(dtype), unpack_signs(weight, values.shape[-1], dtype)).float()


def linear_w1a8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    grid: Tensor | None = None,
    gelu: bool = False,
    norm: Norm | None = None,
) -> Tensor:
    r"""A linear layer with packed 1-bit weights and activations quantized to int8, token by token or on one grid.

    Formula:
        y[..., o] = (\sum_i (+-1)[o, i] q[..., i]) (step[...] scale[o]) + bias[o], the sum exact, the rest in fp32;
        q and step: `quantize_activations`

    Args:
        x: `[..., I]`, floating point.
        weight: `[O, ceil(I / 8)]`, uint8, see `packing.layout`.
        scale: `[O]`, floating point.
        bias: `[O]` or None.
        grid: as in `quantize_activations`.
        gelu: return GELU(y) = y Phi(y), before it is rounded to the dtype of `x`.
        norm: normalizes `x` first, without rounding to its dtype.

    Returns:
        `[..., O]`, dtype of `x`.
    """
    q, step = quantize_activations(x if norm is None else norm(x), grid)
    result = _integer_sums(q, weight, INT8_PEAK) * (step * scale.float())
    return _finish(result, bias, gelu).to(x.dtype)


def linear_w1a1(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None = None,
    gelu: bool = False,
    norm: Norm | None = None,
) -> Tensor:
    r"""A linear layer with packed 1-bit weights and the signs of its activations.

    Formula:
        y[..., o] = scale[o] \sum_i (+-1)[o, i] a[..., i] + bias[o],   a = +1 where x[..., i] \ge threshold[i], else -1

    Args:
        x: `[..., I]`, floating point.
        weight: `[O, ceil(I / 8)]`, uint8, see `packing.layout`.
        scale: `[O]`, floating point.
        bias: `[O]` or None.
        threshold: `[I]`, or None for 0.
        gelu: return GELU(y) = y Phi(y), before it is rounded to the dtype of `x`.
        norm: normalizes `x` first, without rounding to its dtype.

    Returns:
        `[..., O]`, dtype of `x`.
    """
    values = (x if norm is None else norm(x)).float()
    signs = (values >= (0 if threshold is None else threshold.float())).float() * 2 - 1
    result = _integer_sums(signs, weight, 1) * scale.float()
    return _finish(result, bias, gelu).to(x.dtype)


def linear_w1_grad_input(grad: Tensor, weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    r"""The gradient of `linear_w1` with respect to its input.

    Formula:
        dL/dx[..., i] = \sum_o scale[o] (+-1)[o, i] grad[..., o]

    Args:
        grad: `[..., O]`.
        weight: `[O, ceil(I / 8)]`, uint8.
        scale: `[O]`.
        columns: `I`.

    Returns:
        `[..., I]`, dtype of `grad`.
    """
    dtype = _accumulation_dtype(grad.dtype)
    result: Tensor = (grad.to(dtype) * scale.to(dtype)) @ unpack_signs(weight, columns, dtype)
    return result.to(grad.dtype)


def unpack_weight(weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    """The float weight that a packed one stands for.

    Args:
        weight: `[O, ceil(columns / 8)]`, uint8.
        scale: `[O]`, floating point.
        columns: `I`.

    Returns:
        `[O, I]` of plus and minus the row scale, dtype of `scale`.
    """
    return unpack_signs(weight, columns, scale.dtype) * scale.unsqueeze(1)
