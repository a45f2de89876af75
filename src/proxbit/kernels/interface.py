"""The C interface of the compiled kernels, csrc/proxbit.h: its enums, its structs, and the library behind it."""

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path

import torch

from proxbit.errors import ConfigError

__all__ = [
    "FORMATS",
    "FUNCTIONS",
    "KINDS",
    "PART_ROWS",
    "ActivationsStruct",
    "LatentStruct",
    "LinearStruct",
    "find_library",
    "open_library",
    "parallel_for",
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

_SUFFIXES = {"darwin": ".dylib", "win32": ".dll"}
_IMPORTED_BY = os.getpid()
# A pointer as its address: an integer is set faster than a c_void_p.
_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_ssize_t


class LinearStruct(ctypes.Structure):
    """`proxbit_linear_call`."""

    _fields_ = (
        ("isa", _NUMBER),
        ("format", _NUMBER),
        ("dtype", _NUMBER),
        ("rows", _NUMBER),
        ("inputs", _NUMBER),
        ("outputs", _NUMBER),
        ("x", _POINTER),
        ("x_stride", _NUMBER),
        ("tiles", _POINTER),
        ("scale", _POINTER),
        ("bias", _POINTER),
        ("levels", _POINTER),
        ("y", _POINTER),
        ("parallel_for", _POINTER),
        ("threads", _NUMBER),
        ("gelu", _NUMBER),
        ("norm_weight", _POINTER),
        ("norm_bias", _POINTER),
        ("norm_eps", ctypes.c_double),
    )


class LatentStruct(ctypes.Structure):
    """`proxbit_latent_call`."""

    _fields_ = (
        ("isa", _NUMBER),
        ("function", _NUMBER),
        ("rows", _NUMBER),
        ("columns", _NUMBER),
        ("mu", _POINTER),
        ("latent", _POINTER),
        ("grad", _POINTER),
        ("divisor", _POINTER),
        ("factor", _POINTER),
        ("result", _POINTER),
        ("find_divisor", _NUMBER),
        ("find_factor", _NUMBER),
        ("parallel_for", _POINTER),
    )


class ActivationsStruct(ctypes.Structure):
    """`proxbit_activations_call`."""

    _fields_ = (
        ("isa", _NUMBER),
        ("kind", _NUMBER),
        ("forward", _NUMBER),
        ("backward", _NUMBER),
        ("lowest", _NUMBER),
        ("highest", _NUMBER),
        ("rows", _NUMBER),
        ("columns", _NUMBER),
        ("mu", _POINTER),
        ("scale", _POINTER),
        ("threshold", _POINTER),
        ("x", _POINTER),
        ("values", _POINTER),
        ("grad", _POINTER),
        ("sums", _POINTER),
        ("parallel_for", _POINTER),
    )


_STRUCTS = LinearStruct, LatentStruct, ActivationsStruct
_NUMBERS = [*map(ctypes.sizeof, _STRUCTS), len(FORMATS), len(FUNCTIONS), len(KINDS), PART_ROWS]
_LATENT = ctypes.POINTER(LatentStruct)
_SIGNATURES = {
    "interface": (ctypes.POINTER(_NUMBER), []),
    "isa_name": (ctypes.c_char_p, [_NUMBER]),
    "isa_runs": (ctypes.c_int32, [_NUMBER]),
    "tile_bytes": (_NUMBER, [_NUMBER] * 4),
    "repack": (None, [_NUMBER, _NUMBER, _POINTER, _NUMBER, _NUMBER, _POINTER]),
    "linear": (None, [ctypes.POINTER(LinearStruct)]),
    "quantize": (None, [_LATENT]),
    "gradient": (None, [_LATENT]),
    "activations": (None, [ctypes.POINTER(ActivationsStruct)]),
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


def find_library(folders: Sequence[str]) -> Path | None:
    """The library in `lib` beside the modules of this package, or None where it was installed without one."""
    name = f"libproxbit{_SUFFIXES.get(sys.platform, '.so')}"
    return next((path for folder in folders if (path := Path(folder, "lib", name)).exists()), None)


@cache
def parallel_for() -> int:
    """The address of torch's own parallel loop, so that threads are torch's; 0, for one thread, where there is none."""
    if os.getpid() != _IMPORTED_BY:
        return 0  # The pool of threads stayed in the process that forked: waiting for them would take for ever.
    name = f"libtorch_cpu{_SUFFIXES.get(sys.platform, '.so')}"
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).torch_parallel_for
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=parallel_for.cache_clear)
