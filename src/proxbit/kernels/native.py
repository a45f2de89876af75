"""The compiled kernels for CPUs: finding the library, choosing the instruction level, calling it."""

import ctypes
import math
import os
import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from proxbit.errors import ConfigError, PackedFormatError
from proxbit.kernels.interface import FORMATS, LINEAR_CALL, open_library
from proxbit.kernels.reference import Norm
from proxbit.packing import packed_columns

__all__ = [
    "Native",
    "address_of",
    "aligned",
    "find_library",
    "is_dense",
    "is_plain",
    "is_recorded",
    "mu_of",
    "native",
    "native_for",
    "parallel_for",
    "version_of",
    "whole",
]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_SUFFIXES = {"darwin": ".dylib", "win32": ".dll"}
_LEVEL_VARIABLE = "PROXBIT_ISA"
_REFERENCE = "reference"
_IMPORTED_BY = os.getpid()
# Up to here sums of int8 values fit in the 32 bits that the kernels have for them.
_MOST_INPUTS = 2**24


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None if it was made in inference mode, where nobody counts."""
    return None if tensor.is_inference() else tensor._version


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


@dataclass
class Native:
    """The library at one instruction level.

    Attributes:
        path: of the library.
        name: of the level.
        level: its index.
    """

    path: Path
    name: str
    level: int
    library: ctypes.CDLL
    # By identity and format of the weight: a weak reference to it; its version, address and shape, and the columns; its
    # tiles.
    tiles: dict[tuple[int, int], tuple[weakref.ref[Tensor], tuple[Any, ...], Tensor]] = field(default_factory=dict)

    def linear(
        self,
        activations: str,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        levels: Tensor | None = None,
        gelu: bool = False,
        norm: Norm | None = None,
    ) -> Tensor:
        """A linear layer, see `reference`; `x` is one that `takes` is true for, and shapes match, as `ops` checks.

        Raises:
            PackedFormatError: for a tensor without data in the memory of the CPU.
        """
        columns, rows = x.shape[-1], weight.shape[0]
        flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), columns)
        if flat.stride(1) != 1 or flat.is_neg():
            flat = flat.resolve_neg().contiguous()
        flat = aligned(flat)
        # Variables, so that what is converted lives as long as the call reads it.
        scales, bias, levels = _as_floats(scale), _as_floats(bias), _as_floats(levels)
        norm_weight, norm_bias = (None, None) if norm is None else (_as_floats(norm.weight), _as_floats(norm.bias))
        code = FORMATS.index(activations)
        tiles = self._tiles(code, weight, columns)
        result = x.new_empty((*x.shape[:-1], rows))
        call = LINEAR_CALL.pack(
            self.level,
            code,
            _DTYPES[x.dtype],
            flat.shape[0],
            columns,
            rows,
            address_of(flat),
            flat.stride(0),
            address_of(tiles),
            address_of(scales),
            address_of(bias),
            address_of(levels),
            result.data_ptr(),
            parallel_for(),
            torch.get_num_threads(),
            gelu,
            address_of(norm_weight),
            address_of(norm_bias),
            0.0 if norm is None else norm.eps,
        )
        self.library.proxbit_linear(call)
        return result

    def _tiles(self, code: int, weight: Tensor, columns: int) -> Tensor:
        """The weight in the order of the kernel, made once for each weight and kept as long as it lives."""
        version = version_of(weight)
        key, state = (id(weight), code), (version, weight.data_ptr(), weight.shape, columns)
        known = self.tiles.get(key)
        if known is not None and known[0]() is weight and known[1] == state:
            return known[2]
        bits = whole(weight).contiguous()
        size = self.library.proxbit_tile_bytes(self.level, code, len(bits), columns)
        if not size:
            return bits
        tiles = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.library.proxbit_relay(self.level, code, address_of(bits), len(bits), columns, address_of(tiles))
        # Of a weight whose changes are not counted nothing is kept.
        if version is not None:
            forget = weakref.ref(weight, lambda _: self.tiles.pop(key, None))
            self.tiles[key] = (forget, state, tiles)
        return tiles

    def pack_signs(self, values: Tensor) -> Tensor:
        """See `packing.pack_signs`; `values` is a matrix in fp32 or bf16 on the CPU."""
        if values.stride(1) != 1 or values.is_neg():
            values = values.resolve_neg().contiguous()
        values = aligned(values)
        rows, columns = values.shape
        bits = torch.empty(rows, packed_columns(columns), dtype=torch.uint8, device="cpu")
        self.library.proxbit_pack_signs(
            self.level,
            _DTYPES[values.dtype],
            address_of(whole(values)),
            rows,
            columns,
            values.stride(0),
            bits.data_ptr(),
            parallel_for(),
        )
        return bits

    def unpack_signs(self, bits: Tensor, columns: int) -> Tensor:
        """See `packing.unpack_signs`, in fp32."""
        values = torch.empty(len(bits), columns, dtype=torch.float32, device="cpu")
        bits = whole(bits).contiguous()
        self.library.proxbit_unpack_signs(
            self.level, address_of(bits), len(bits), columns, values.data_ptr(), parallel_for()
        )
        return values

    @property
    def is_portable(self) -> bool:
        """Whether this is the level without vector instructions of its own."""
        return self.name == "portable"

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Whether the kernels work on this dtype, and on this many inputs."""
        return x.dtype in _DTYPES and x.shape[-1] <= _MOST_INPUTS


def is_dense(tensor: Tensor) -> bool:
    """Whether its numbers are all that there is to a tensor: contiguous, not empty, of no subclass."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.is_contiguous() and not tensor.is_neg() and tensor.numel() > 0


def is_plain(tensor: Tensor) -> bool:
    """Whether the library can read a tensor as it is: dense, in fp32, on the CPU."""
    return tensor.is_cpu and tensor.dtype is torch.float32 and is_dense(tensor) and tensor.data_ptr() % 4 == 0


def is_recorded() -> bool:
    """Whether something looks at the operators of torch, or takes their place: it does not see what a kernel does that
    is no operator."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or _get_current_dispatch_mode() is not None


def native_for(*tensors: Tensor) -> Native | None:
    """The compiled kernels, where they can read all of these tensors as they are and nothing is recorded."""
    return native() if not is_recorded() and all(is_plain(tensor) for tensor in tensors) else None


def mu_of(mu: Tensor) -> Tensor:
    """A sharpness as the library reads it; to read it in Python would show as a wait for an accelerator."""
    return aligned(mu.to("cpu", torch.float64))


def aligned(tensor: Tensor) -> Tensor:
    """The same numbers at an address where the processor can read them, as those of files and buffers need not be."""
    return tensor.clone() if tensor.is_cpu and tensor.data_ptr() % tensor.element_size() else tensor


def address_of(tensor: Tensor | None) -> int:
    """Where the data are: the one place where the library gets a pointer from.

    Raises:
        PackedFormatError: for a tensor of another device, whose storage was freed, or that is not `aligned`.
    """
    if tensor is None:
        return 0
    address = tensor.data_ptr() if tensor.is_cpu else 0
    if address % tensor.element_size():
        raise PackedFormatError(
            f"The kernels of the CPU were given a tensor {list(tensor.shape)} of {tensor.dtype} at an address that is "
            f"no multiple of {tensor.element_size()}."
        )
    if not address and (not tensor.is_cpu or tensor.numel()):
        what = "whose storage was freed" if tensor.is_cpu else f"on the device {tensor.device}"
        raise PackedFormatError(f"The kernels of the CPU were given a tensor {list(tensor.shape)} {what}.")
    return address


def whole(tensor: Tensor) -> Tensor:
    """The same tensor, whose storage is as long as its shape and strides say.

    Raises:
        PackedFormatError: if it is not, or is on another device.
    """
    if not tensor.is_cpu:
        address_of(tensor)
    reach = tensor.numel()
    if not tensor.is_contiguous():
        reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() and (tensor.storage_offset() + reach) * tensor.element_size() > held:
        raise PackedFormatError(
            f"A tensor {list(tensor.shape)} of {tensor.dtype} reaches beyond its storage of {held} bytes."
        )
    return tensor


def _as_floats(numbers: Tensor | None) -> Tensor | None:
    """In fp32, contiguous, and where the processor can read a float."""
    if numbers is None:
        return None
    if numbers.dtype is torch.float32 and numbers.is_contiguous() and not numbers.is_neg():
        return aligned(numbers)
    return numbers.resolve_neg().to(torch.float32).contiguous()


def levels(path: Path) -> dict[str, Native]:
    """The levels of a library that this processor runs, by name, fastest first."""
    library = open_library(path)
    found: dict[str, Native] = {}
    index = 0
    while name := library.proxbit_level_name(index):
        if library.proxbit_level_runs(index):
            found[name.decode()] = Native(path, name.decode(), index, library)
        index += 1
    return found


def choose(path: Path | None, environment: Mapping[str, str]) -> Native | None:
    """The level to run: the fastest, or the one that the environment variable PROXBIT_ISA names.

    Returns:
        None for the reference.

    Raises:
        ConfigError: if PROXBIT_ISA names a level that this machine does not run, or the library is of another version.
    """
    wanted = environment.get(_LEVEL_VARIABLE)
    if wanted == _REFERENCE:
        return None
    found = {} if path is None else levels(path)
    if wanted and wanted not in found:
        valid = ", ".join([*found, _REFERENCE])
        raise ConfigError(f"{_LEVEL_VARIABLE} is {wanted!r}; this machine and this installation run: {valid}.")
    if not found:
        warnings.warn(
            "proxbit was installed without its compiled kernels (no C++ compiler was found): packed layers run on the "
            "plain torch reference, which is slow. Install a compiler, then: pip install --force-reinstall proxbit",
            stacklevel=2,
        )
        return None
    return found[wanted] if wanted else next(iter(found.values()))


@cache
def native() -> Native | None:
    """The compiled kernels that this process uses, or None where it uses the reference."""
    return choose(find_library([str(Path(__file__).parent), *sys.modules[__package__].__path__]), os.environ)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=parallel_for.cache_clear)
