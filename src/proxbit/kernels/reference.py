"""Plain torch implementations of the ops: what every other kernel is measured against."""

import torch
from torch import Tensor

from proxbit.packing import unpack_signs

__all__ = ["linear_w1", "linear_w1_grad_input", "unpack_weight"]


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def linear_w1(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    r"""A linear layer with packed 1-bit weights.

    Formula:
        y[..., o] = scale[o] \sum_i (+-1)[o, i] x[..., i] + bias[o], summed in fp32 (fp64 for fp64 inputs).

    Args:
        x: `[..., I]`, fp16, bf16, fp32 or fp64.
        weight: `[O, ceil(I / 8)]`, uint8, see `packing.layout`.
        scale: `[O]`, floating point.
        bias: `[O]` or None.

    Returns:
        `[..., O]`, dtype of `x`.
    """
    dtype = _accumulation_dtype(x.dtype)
    result = torch.nn.functional.linear(x.to(dtype), unpack_signs(weight, x.shape[-1], dtype)) * scale.to(dtype)
    if bias is not None:
        result = result + bias.to(dtype)
    return result.to(x.dtype)


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
