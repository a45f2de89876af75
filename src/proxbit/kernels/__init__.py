"""Operators on packed weights. Importing this package registers them with torch."""

from proxbit.kernels.activations import INT8, Levels, level_gradient, level_values
from proxbit.kernels.decompositions import decompositions
from proxbit.kernels.interface import FORMATS
from proxbit.kernels.latents import latent_kernels
from proxbit.kernels.native import Native, native, native_for, version_of
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
from proxbit.kernels.reference import Norm, quantize_activations

__all__ = [
    "FORMATS",
    "INT8",
    "Levels",
    "Native",
    "Norm",
    "decompositions",
    "latent_kernels",
    "level_gradient",
    "level_values",
    "linear_kernel",
    "linear_w1",
    "linear_w1a1",
    "linear_w1a8",
    "native",
    "native_for",
    "pack_signs",
    "quantize_activations",
    "round_activations",
    "unpack_signs",
    "unpack_weight",
    "version_of",
]
