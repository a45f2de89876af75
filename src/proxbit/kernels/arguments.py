"""The arguments of the kernels: one object a call, the same for every backend."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxbit.errors import PackedFormatError

__all__ = ["INT8", "LatentRows", "Levels", "LinearCall", "Norm", "accumulation_dtype"]


# Of the arguments of an operator from the levels on.
_DEFAULTS: tuple[Any, ...] = (None, False, None, None, 0.0)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that numbers of a dtype are summed in: fp32 for half precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


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
        dtype = accumulation_dtype(x.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return torch.nn.functional.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, self.eps)


class LinearCall(NamedTuple):
    """One call of a packed linear layer.

    Attributes:
        activations: what they are multiplied as, one of `interface.FORMATS`.
        x: `[..., I]`, floating point.
        weight: `[O, ceil(I / 8)]`, uint8, see `packing.layout`.
        scale: `[O]`, floating point.
        bias: `[O]` or None.
        levels: of "sign" the thresholds, `[I]`, or None for 0; of "int8" the grid, `[3]`: step, lowest code, from -127
            to 0, and highest, from 0 to 127, or None for a step of each row; of "float" None.
        gelu: return GELU(y) = y Phi(y), before it is rounded to the dtype of `x`.
        norm: normalizes `x` first, without rounding to its dtype.
    """

    activations: str
    x: Tensor
    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None
    levels: Tensor | None = None
    gelu: bool = False
    norm: Norm | None = None

    @classmethod
    def of_operator(
        cls, activations: str, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *rest: Any
    ) -> "LinearCall":
        """From the arguments of an operator, of which torch leaves out those at the end that are defaults.

        Raises:
            PackedFormatError: if only one of weight and bias of the normalization is given.
        """
        rest = (None, *rest) if activations == "float" else rest
        levels, gelu, weight_of_norm, bias_of_norm, eps = rest + _DEFAULTS[len(rest) :]
        if (weight_of_norm is None) != (bias_of_norm is None):
            raise PackedFormatError("norm_weight and norm_bias come together.")
        norm = None if weight_of_norm is None else Norm(weight_of_norm, bias_of_norm, eps)
        return cls(activations, x, weight, scale, bias, levels, gelu, norm)


class LatentRows(NamedTuple):
    """Rows of latent weights, and what a quantizer makes of them: W, F_mu(W / s) and a.

    Attributes:
        function: F, or B for a gradient; one of `interface.FUNCTIONS`.
        latent: W, `[rows, columns]`.
        mu: sharpness, a 0-dimensional tensor.
        divisor: s, `[rows, 1]` in fp32; None for the mean of |W| of each row, at least the smallest normal number.
        factor: a, `[rows, 1]` in fp32; None for the one that `quantize_rows` finds.
    """

    function: str
    latent: Tensor
    mu: Tensor
    divisor: Tensor | None = None
    factor: Tensor | None = None


class Levels(NamedTuple):
    """What activations become in training.

    Attributes:
        kind: one of `interface.KINDS`.
        forward: F of two levels, one of `interface.FUNCTIONS`; None for the levels themselves.
        backward: B of two levels, likewise.
        mu: sharpness of both, a 0-dimensional tensor.
        codes: the lowest and the highest of a grid.
    """

    kind: str
    forward: str | None = None
    backward: str = "one"
    mu: Tensor | None = None
    codes: tuple[int, int] = (0, 0)


INT8 = Levels("int8")
