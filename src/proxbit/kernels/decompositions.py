"""The operators in plain torch, for exporters that know no others."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from proxbit.kernels import reference
from proxbit.kernels.reference import norm_of

__all__ = ["decompositions"]


def _without_threshold(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A linear operator of the reference with the arguments of the schema."""

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
        return linear(x, weight, scale, bias, gelu, norm_of(norm_weight, norm_bias, norm_eps))

    return run


def _linear_w1a1(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    gelu: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
) -> Tensor:
    norm = norm_of(norm_weight, norm_bias, norm_eps)
    return reference.linear_w1a1(x, weight, scale, bias, threshold, gelu, norm)


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """What `torch.export.ExportedProgram.run_decompositions` puts in the place of the operators of a packed model."""
    operators = torch.ops.proxbit
    return {
        operators.linear_w1.default: _without_threshold(reference.linear_w1),
        operators.linear_w1a8.default: _without_threshold(reference.linear_w1a8),
        operators.linear_w1a1.default: _linear_w1a1,
        operators.unpack_signs.default: reference.unpack_signs,
        operators.unpack_weight.default: reference.unpack_weight,
    }
