"""Layers: latent (`BinaryLinear`, `BinaryConv2d`) and packed (`PackedLinear`, `PackedConv2d`)."""

from proxbit.deprecation import renamed
from proxbit.nn.activation_quantizer import DEFAULT_ACTIVATION_PAIR, ActivationQuantizer
from proxbit.nn.activations import ACTIVATIONS, check_activations
from proxbit.nn.adapted import guard_adapter
from proxbit.nn.attention import BinaryProbabilities
from proxbit.nn.binary_conv import BinaryConv2d
from proxbit.nn.binary_linear import BinaryLinear
from proxbit.nn.epilogue import ACCUMULATORS, Accumulator, Epilogue, RPReLU
from proxbit.nn.latent import (
    LatentWeight,
    binary_activations,
    evaluating,
    latent_layers,
    set_mu,
    soft_evaluation,
    start_update,
)
from proxbit.nn.layer import BinaryLayer
from proxbit.nn.learned import Learned, learned_modules
from proxbit.nn.packed import PackedWeight
from proxbit.nn.packed_conv import PackedConv2d
from proxbit.nn.packed_linear import PackedLinear
from proxbit.nn.precision import HALF, dtype_around, keep_single, unrounded
from proxbit.nn.shared_input import SharedInput

__all__ = [
    "ACCUMULATORS",
    "ACTIVATIONS",
    "DEFAULT_ACTIVATION_PAIR",
    "HALF",
    "Accumulator",
    "ActivationQuantizer",
    "BinaryConv2d",
    "BinaryLayer",
    "BinaryLinear",
    "BinaryProbabilities",
    "Epilogue",
    "LatentWeight",
    "Learned",
    "PackedConv2d",
    "PackedLinear",
    "PackedWeight",
    "RPReLU",
    "SharedInput",
    "binary_activations",
    "check_activations",
    "dtype_around",
    "evaluating",
    "guard_adapter",
    "keep_single",
    "latent_layers",
    "learned_modules",
    "set_mu",
    "soft_evaluation",
    "start_update",
    "unrounded",
]

__getattr__ = renamed(__name__, {"Surroundings": ("BinaryLayer", BinaryLayer)})
