"""The backend of GPUs from Ampere on, in Triton."""

import torch
from torch import Tensor

from proxbit.kernels.memory import is_dense
from proxbit.kernels.triton.latents import gradient_rows, quantize_rows
from proxbit.kernels.triton.linear import linear, runs_on

__all__ = ["gradient_rows", "linear", "name", "quantize_rows", "takes"]

name = "triton"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def takes(operation: str, tensors: tuple[Tensor, ...]) -> bool:
    """Whether an operation, a function of this module, works on tensors; latent weights must be dense."""
    x = tensors[0]
    if operation not in ("linear", "quantize_rows") or x.dtype not in _DTYPES or not runs_on(x.device):
        return False
    return operation == "linear" or is_dense(x)
