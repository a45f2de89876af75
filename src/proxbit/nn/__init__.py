"""Layers: latent (`BinaryLinear`, `BinaryConv2d`) and packed (`PackedLinear`, `PackedConv2d`)."""

from proxbit.nn.accumulators import ACCUMULATORS, Accumulator
from proxbit.nn.activation_quantizer import DEFAULT_ACTIVATION_PAIR, ActivationQuantizer
from proxbit.nn.activations import ACTIVATIONS, check_activations
from proxbit.nn.adapted import guard_adapter
from proxbit.nn.binary_conv import BinaryConv2d
from proxbit.nn.binary_linear import BinaryLinear
from proxbit.nn.latent import LatentWeight, binary_activations, latent_layers, set_mu, soft_evaluation, start_update
from proxbit.nn.learned import Learned, learned_modules
from proxbit.nn.modes import evaluating
from proxbit.nn.packed_conv import PackedConv2d
from proxbit.nn.packed_linear import PackedLinear
from proxbit.nn.precision import HALF, dtype_around, keep_single, unrounded
from proxbit.nn.probabilities import BinaryProbabilities
from proxbit.nn.rprelu import RPReLU
from proxbit.nn.shared_input import SharedInput
from proxbit.nn.surroundings import Surroundings

__all__ = [
    "ACCUMULATORS",
    "ACTIVATIONS",
    "DEFAULT_ACTIVATION_PAIR",
    "HALF",
    "Accumulator",
    "ActivationQuantizer",
    "BinaryConv2d",
    "BinaryLinear",
    "BinaryProbabilities",
    "LatentWeight",
    "Learned",
    "PackedConv2d",
    "PackedLinear",
    "RPReLU",
    "SharedInput",
    "Surroundings",
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
