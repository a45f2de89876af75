"""Quantizer pairs: proximal maps, transforms, the pairs made of them, schedules of mu, and the autograd function."""

import proxbit.quantizers.family  # noqa: F401  (registers the family)
from proxbit.quantizers.autograd import (
    HardRows,
    RecomputedWeight,
    hard_rows,
    quantize,
    recomputed_weight,
    update_start,
)
from proxbit.quantizers.catalog import PAIRS, get_pair, pair_key, register_pair
from proxbit.quantizers.compiled import compiled_functions
from proxbit.quantizers.decomposition import Decomposition, decompose, regularizer
from proxbit.quantizers.enhancement import enhance
from proxbit.quantizers.pairs import BINARY, ROW_LEAST_SQUARES, QuantizerPair, Surrogate, compose, heuristic
from proxbit.quantizers.proximal import ProximalMap, linear_quantizer
from proxbit.quantizers.scaling import check_rows, check_scaling
from proxbit.quantizers.schedules import AGGREGATE, CONSTANT, SCHEDULES, MuSchedule
from proxbit.quantizers.transforms import Transform

__all__ = [
    "AGGREGATE",
    "BINARY",
    "CONSTANT",
    "PAIRS",
    "ROW_LEAST_SQUARES",
    "SCHEDULES",
    "Decomposition",
    "HardRows",
    "MuSchedule",
    "ProximalMap",
    "QuantizerPair",
    "RecomputedWeight",
    "Surrogate",
    "Transform",
    "check_rows",
    "check_scaling",
    "compiled_functions",
    "compose",
    "decompose",
    "enhance",
    "get_pair",
    "hard_rows",
    "heuristic",
    "linear_quantizer",
    "pair_key",
    "quantize",
    "recomputed_weight",
    "register_pair",
    "regularizer",
    "update_start",
]
