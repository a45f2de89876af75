"""The backend of plain torch: what every other kernel is measured against, for tensors that no other takes."""

import torch
from torch import Tensor

from proxbit.kernels.arguments import LinearCall, accumulation_dtype
from proxbit.packing import pack_signs, unpack_signs

__all__ = [
    "linear",
    "linear_w1_grad_input",
    "name",
    "pack_signs",
    "quantize_activations",
    "takes",
    "unpack_signs",
    "unpack_weight",
]

name = "reference"
INT8_PEAK = 127
# An fp32 sum of integers is exact up to 2^24.
_EXACT = 2**24
# Below this a row counts as zero: 127 over its peak would be out of the range of fp32.
_SMALLEST_PEAK = 1e-30


def takes(operation: str, tensors: tuple[Tensor, ...]) -> bool:
    """Whether an operation is a function of this module. Quantizers of latent weights and of activations in training
    are not: their formulas are in `quantizers` and `nn`."""
    return operation in ("linear", "pack_signs", "unpack_signs")


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
        wide = x.to(accumulation_dtype(x.dtype))
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


def linear(call: LinearCall) -> Tensor:
    """See `ops.linear_w1`, `linear_w1a8` and `linear_w1a1`."""
    activations, x, weight, scale, bias, levels, gelu, norm = call
    values = x if norm is None else norm(x)
    if activations == "float":
        dtype = accumulation_dtype(x.dtype)
        signs = unpack_signs(weight, x.shape[-1], dtype)
        result = torch.nn.functional.linear(values.to(dtype), signs) * scale.to(dtype)
    elif activations == "int8":
        q, step = quantize_activations(values, levels)
        result = _integer_sums(q, weight, INT8_PEAK) * (step * scale.float())
    else:
        signs = (values.float() >= (0 if levels is None else levels.float())).float() * 2 - 1
        result = _integer_sums(signs, weight, 1) * scale.float()
    if bias is not None:
        result = result + bias.to(result.dtype)
    return (torch.nn.functional.gelu(result) if gelu else result).to(x.dtype)


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
    dtype = accumulation_dtype(grad.dtype)
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
