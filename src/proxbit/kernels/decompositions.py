"""The operators in plain torch, for exporters that know no others."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from proxbit.kernels import reference
from proxbit.kernels.arguments import LinearCall

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """What `torch.export.ExportedProgram.run_decompositions` puts in the place of the operators of a packed model."""
    operators = torch.ops.proxbit
    return {
        operators.linear_w1.default: lambda *given: reference.linear(LinearCall.of_operator("float", *given)),
        operators.linear_w1a8.default: lambda *given: reference.linear(LinearCall.of_operator("int8", *given)),
        operators.linear_w1a1.default: lambda *given: reference.linear(LinearCall.of_operator("sign", *given)),
        operators.unpack_signs.default: reference.unpack_signs,
        operators.unpack_weight.default: reference.unpack_weight,
    }
