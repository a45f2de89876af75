"""Operators on packed weights. Importing this package registers them with torch."""

from proxbit.kernels.decompositions import decompositions
from proxbit.kernels.native import FORMATS, native, version_of
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
from proxbit.kernels.quantizer import latent_kernels
from proxbit.kernels.reference import Norm, quantize_activations

__all__ = [
    "FORMATS",
    "Norm",
    "decompositions",
    "latent_kernels",
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
