"""The table of functions, the pairs made of them, row units, schedules of mu, and the autograd function."""

import proxbit.quantizers.family  # noqa: F401  (registers the family)
from proxbit.deprecation import renamed
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
from proxbit.quantizers.deprecated import proximal_map, surrogate, transform
from proxbit.quantizers.enhancement import enhance
from proxbit.quantizers.functions import FUNCTIONS, Function
from proxbit.quantizers.levels import linear_quantizer
from proxbit.quantizers.pairs import BINARY, ROW_LEAST_SQUARES, QuantizerPair, compose, heuristic
from proxbit.quantizers.row_units import RowUnits, check_rows
from proxbit.quantizers.schedules import AGGREGATE, CONSTANT, SCHEDULES, MuSchedule

__all__ = [
    "AGGREGATE",
    "BINARY",
    "CONSTANT",
    "FUNCTIONS",
    "PAIRS",
    "ROW_LEAST_SQUARES",
    "SCHEDULES",
    "Decomposition",
    "Function",
    "HardRows",
    "MuSchedule",
    "QuantizerPair",
    "RecomputedWeight",
    "RowUnits",
    "check_rows",
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

__getattr__ = renamed(
    __name__,
    {
        "ProximalMap": ("Function", proximal_map),
        "Surrogate": ("Function", surrogate),
        "Transform": ("Function", transform),
        "check_scaling": ("RowUnits", RowUnits),
    },
)
