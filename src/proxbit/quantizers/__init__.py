"""Quantizer pairs: proximal maps, transforms, the pairs made of them, schedules of mu, and the autograd function."""

from proxbit.quantizers.autograd import hard_scale, quantize
from proxbit.quantizers.pairs import (
    PAIRS,
    QuantizerPair,
    Surrogate,
    compose,
    get_pair,
    heuristic,
    pair_name,
    register_pair,
)
from proxbit.quantizers.proximal import ProximalMap, linear_quantizer
from proxbit.quantizers.schedules import AGGREGATE, SCHEDULES, MuSchedule
from proxbit.quantizers.transforms import Transform

__all__ = [
    "AGGREGATE",
    "PAIRS",
    "SCHEDULES",
    "MuSchedule",
    "ProximalMap",
    "QuantizerPair",
    "Surrogate",
    "Transform",
    "compose",
    "get_pair",
    "hard_scale",
    "heuristic",
    "linear_quantizer",
    "pair_name",
    "quantize",
    "register_pair",
]
