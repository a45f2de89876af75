"""The operators in plain torch, for exporters that know no others."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from proxbit.kernels import reference
from proxbit.kernels.reference import with_levels, without_levels

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """What `torch.export.ExportedProgram.run_decompositions` puts in the place of the operators of a packed model."""
    operators = torch.ops.proxbit
    return {
        operators.linear_w1.default: without_levels(reference.linear_w1),
        operators.linear_w1a8.default: with_levels(reference.linear_w1a8),
        operators.linear_w1a1.default: with_levels(reference.linear_w1a1),
        operators.unpack_signs.default: reference.unpack_signs,
        operators.unpack_weight.default: reference.unpack_weight,
    }
