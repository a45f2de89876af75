"""What works on latent weights: which kernels, and the operators around them that a compiler sees."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxbit.errors import PackedFormatError
from proxbit.kernels.interface import FUNCTIONS
from proxbit.kernels.native import Native, is_recorded, native, native_for
from proxbit.kernels.quantizer import gradient_rows, quantize_rows

try:
    from proxbit.kernels import triton_quantizer
except ImportError:  # Triton is optional: without it torch's operators run on CUDA.
    triton_quantizer = None  # type: ignore[assignment]

__all__ = ["LatentKernels", "latent_kernels"]

_SCALES = ("ls", "fixed")


class LatentKernels(NamedTuple):
    """What works on a latent weight where it is.

    Attributes:
        quantize: `quantizer.quantize_rows` without a level.
        gradient: `quantizer.gradient_rows` without a level.
    """

    quantize: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gradient: Callable[..., Tensor]


def latent_kernels(latent: Tensor) -> LatentKernels | None:
    """The kernels for a latent weight, `[rows, columns]`; None where torch's operators must do it."""
    if is_recorded():
        return _AS_OPERATORS if _is_compiled_for(latent) else None
    if triton_quantizer is not None and triton_quantizer.takes(latent):
        return LatentKernels(triton_quantizer.quantize_rows, triton_quantizer.gradient_rows)
    level = native_for(latent)
    return None if level is None else LatentKernels(partial(quantize_rows, level), partial(gradient_rows, level))


def _is_compiled_for(latent: Tensor) -> bool:
    """Whether this is `torch.compile`, for the CPU of this process. An exported graph has to run elsewhere; and for a
    GPU inductor makes one kernel of many operators."""
    if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return False
    return latent.is_cpu and latent.dtype is torch.float32 and latent.numel() > 0 and _has_kernels()


@torch.compiler.assume_constant_result
def _has_kernels() -> bool:
    return native() is not None


def _level_for(function: str, latent: Tensor, mu: Tensor, scale: str = "ls") -> Native:
    level = native()
    if level is None:
        raise PackedFormatError("This operator is one of the compiled kernels, without which this process runs.")
    if function not in FUNCTIONS or scale not in _SCALES:
        raise PackedFormatError(
            f"Functions of latent weights are {', '.join(FUNCTIONS)}, and scales {', '.join(_SCALES)}; not "
            f"{function!r} and {scale!r}."
        )
    if latent.dtype != torch.float32 or latent.dim() != 2 or not latent.numel() or mu.numel() != 1:
        raise PackedFormatError(
            f"Latent weights are [rows, columns] in fp32, with one mu; not {list(latent.shape)} in {latent.dtype} with "
            f"{list(mu.shape)}."
        )
    return level


@torch.library.custom_op("proxbit::quantize_rows", mutates_args=(), device_types="cpu")
def _quantize_rows(
    function: str, latent: Tensor, mu: Tensor, scale: str, divisor: Tensor | None, factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    level = _level_for(function, latent, mu, scale)
    result, s, a = quantize_rows(level, function, latent.contiguous(), mu, scale, divisor, factor)
    return result, s.clone(), a.clone()  # An operator does not return what it was given, nor one tensor twice.


@_quantize_rows.register_fake
def _(function: str, latent: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = latent.shape[0]
    return latent.new_empty(latent.shape), latent.new_empty(rows, 1), latent.new_empty(rows, 1)


@torch.library.custom_op("proxbit::gradient_rows", mutates_args=(), device_types="cpu")
def _gradient_rows(function: str, latent: Tensor, mu: Tensor, divisor: Tensor, factor: Tensor, grad: Tensor) -> Tensor:
    level = _level_for(function, latent, mu)
    return gradient_rows(level, function, latent.contiguous(), mu, divisor, factor, grad)


@_gradient_rows.register_fake
def _(function: str, latent: Tensor, *others: Any) -> Tensor:
    return latent.new_empty(latent.shape)


def _gradient(function: str, *tensors: Tensor, overwrite: bool) -> Tensor:
    """The operator; a compiler finds by itself what may lie in the place of what."""
    result: Tensor = _gradient_rows(function, *tensors)
    return result


_AS_OPERATORS = LatentKernels(_quantize_rows, _gradient)
