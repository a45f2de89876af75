"""The C interface of the compiled kernels, csrc/proxbit.h: what its enums and structs are here, and opening it."""

import ctypes
import struct
from itertools import takewhile
from pathlib import Path

from proxbit.errors import ConfigError

__all__ = [
    "ACTIVATIONS_CALL",
    "FORMATS",
    "FUNCTIONS",
    "KINDS",
    "LINEAR_CALL",
    "PART_ROWS",
    "QUANTIZER_CALL",
    "open_library",
]

# Enums, in their order; formulas are in the header.
FORMATS = ("float", "int8", "sign")  # what activations are multiplied as
FUNCTIONS = (
    "one",
    "box",
    "sign",
    "clip",
    "polynomial",
    "polynomial slope",
    "tanh",
    "tanh slope",
    "sign-swish",
    "sign-swish slope",
    "decay",
    "decay slope",
    "series",
    "series slope",
)
KINDS = ("int8", "grid", "signs", "zero or one")
PART_ROWS = 32

LINEAR_CALL = struct.Struct("18qd")
QUANTIZER_CALL = struct.Struct("13q")
ACTIVATIONS_CALL = struct.Struct("16q")

_CALLS = LINEAR_CALL, QUANTIZER_CALL, ACTIVATIONS_CALL
_NUMBERS = [*(call.size for call in _CALLS), len(FORMATS), len(FUNCTIONS), len(KINDS), PART_ROWS]
_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "interface": (ctypes.POINTER(_NUMBER), []),
    "level_name": (ctypes.c_char_p, [_NUMBER]),
    "level_runs": (ctypes.c_int32, [_NUMBER]),
    "tile_bytes": (_NUMBER, [_NUMBER] * 4),
    "relay": (None, [_NUMBER, _NUMBER, _POINTER, _NUMBER, _NUMBER, _POINTER]),
    "linear": (None, [ctypes.c_char_p]),
    "quantize": (None, [ctypes.c_char_p]),
    "gradient": (None, [ctypes.c_char_p]),
    "activations": (None, [ctypes.c_char_p]),
    "pack_signs": (None, [_NUMBER, _NUMBER, _POINTER, _NUMBER, _NUMBER, _NUMBER, _POINTER, _POINTER]),
    "unpack_signs": (None, [_NUMBER, _POINTER, _NUMBER, _NUMBER, _POINTER, _POINTER]),
}


def open_library(path: Path) -> ctypes.CDLL:
    """The library, whose functions are called `proxbit_*`.

    Raises:
        ConfigError: if it was built from another version of the header, as after an update of a checkout alone.
    """
    library = ctypes.CDLL(str(path))
    try:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"proxbit_{name}")
            function.restype, function.argtypes = result, arguments
        numbers = list(takewhile(bool, library.proxbit_interface()))
    except AttributeError:
        numbers = []  # a function is missing
    if numbers != _NUMBERS:
        raise ConfigError(
            f"The compiled kernels {path} are of another version than the rest of proxbit. Install it again: "
            "pip install --force-reinstall --no-deps proxbit, or, in a checkout, pip install -e ."
        )
    return library
