"""Operators on packed weights. Importing this package registers them with torch."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from proxbit.deprecation import renamed
from proxbit.kernels.arguments import INT8, LatentRows, Levels, LinearCall, Norm
from proxbit.kernels.cpu import CpuBackend, native
from proxbit.kernels.decompositions import decompositions
from proxbit.kernels.dispatch import backend_for
from proxbit.kernels.interface import FORMATS
from proxbit.kernels.memory import version_of
from proxbit.kernels.ops import (
    linear_kernel,
    linear_w1,
    linear_w1a1,
    linear_w1a8,
    pack_signs,
    round_activations,
    unpack_signs,
    unpack_weight,
)
from proxbit.kernels.reference import quantize_activations

__all__ = [
    "FORMATS",
    "INT8",
    "CpuBackend",
    "LatentRows",
    "Levels",
    "LinearCall",
    "Norm",
    "backend_for",
    "decompositions",
    "linear_kernel",
    "linear_w1",
    "linear_w1a1",
    "linear_w1a8",
    "native",
    "pack_signs",
    "quantize_activations",
    "round_activations",
    "unpack_signs",
    "unpack_weight",
    "version_of",
]


class _LatentKernels(NamedTuple):
    quantize: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gradient: Callable[..., Tensor]


def _latent_kernels(latent: Tensor) -> _LatentKernels | None:
    backend = backend_for("quantize_rows", latent)
    if backend is None:
        return None

    def quantize(
        function: str, latent: Tensor, mu: Tensor, scale: str, divisor: Tensor | None, factor: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backend.quantize_rows(LatentRows(function, latent, mu, divisor, factor), scale)

    def gradient(
        function: str,
        latent: Tensor,
        mu: Tensor,
        divisor: Tensor,
        factor: Tensor,
        grad: Tensor,
        overwrite: bool = False,
    ) -> Tensor:
        return backend.gradient_rows(LatentRows(function, latent, mu, divisor, factor), grad, overwrite)

    return _LatentKernels(quantize, gradient)


__getattr__ = renamed(
    __name__,
    {
        "Native": ("CpuBackend", CpuBackend),
        "latent_kernels": ("backend_for", _latent_kernels),
        "level_gradient": ("CpuBackend.level_gradient", CpuBackend.level_gradient),
        "level_values": ("CpuBackend.level_values", CpuBackend.level_values),
        "native_for": ("backend_for", lambda *tensors: backend_for("level_values", *tensors)),
    },
)
