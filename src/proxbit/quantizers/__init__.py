"""Quantizer pairs: proximal maps, transforms, the pairs made of them, schedules of mu, and the autograd function."""

import proxbit.quantizers.family  # noqa: F401  (registers the family)
from proxbit.quantizers.autograd import hard_scale, quantize
from proxbit.quantizers.decomposition import Decomposition, decompose, regularizer
from proxbit.quantizers.enhancement import enhance
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
from proxbit.quantizers.scaling import check_scaling
from proxbit.quantizers.schedules import AGGREGATE, SCHEDULES, MuSchedule
from proxbit.quantizers.transforms import Transform

__all__ = [
    "AGGREGATE",
    "PAIRS",
    "SCHEDULES",
    "Decomposition",
    "MuSchedule",
    "ProximalMap",
    "QuantizerPair",
    "Surrogate",
    "Transform",
    "check_scaling",
    "compose",
    "decompose",
    "enhance",
    "get_pair",
    "hard_scale",
    "heuristic",
    "linear_quantizer",
    "pair_name",
    "quantize",
    "register_pair",
    "regularizer",
]
