"""The backend of the CPU: the compiled kernels, at the ISA (instruction set) that suits the processor."""

import ctypes
import math
import os
import sys
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proxbit.errors import ConfigError, PackedFormatError
from proxbit.kernels.arguments import LatentRows, Levels, LinearCall
from proxbit.kernels.interface import (
    FORMATS,
    FUNCTIONS,
    KINDS,
    PART_ROWS,
    ActivationsStruct,
    LatentStruct,
    LinearStruct,
    find_library,
    open_library,
    parallel_for,
)
from proxbit.kernels.memory import address_of, address_of_floats, aligned, is_plain, mu_of, version_of, within_storage
from proxbit.packing import packed_columns

__all__ = ["CpuBackend", "choose", "isas", "native"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ISA_VARIABLE = "PROXBIT_ISA"
_REFERENCE = "reference"
# Up to here sums of int8 values fit in the 32 bits that the kernels have for them.
_MOST_INPUTS = 2**24
# The portable kernels beat torch for fewer rows only; from here on it pays to expand the weight and multiply.
_PORTABLE_ROWS = 16


@dataclass
class CpuBackend:
    """The library at one ISA.

    Attributes:
        path: of the library.
        name: of the ISA.
        isa: its index.
        library: opened.
    """

    path: Path
    name: str
    isa: int
    library: ctypes.CDLL
    # By identity and format of the weight: a weak reference to it; its version, address and shape, and the columns; its
    # tiles.
    tiles: dict[tuple[int, int], tuple[weakref.ref[Tensor], tuple[Any, ...], Tensor]] = field(default_factory=dict)

    def takes(self, operation: str, tensors: tuple[Tensor, ...]) -> bool:
        """Whether an operation, a method of this class, works on tensors of the CPU."""
        x = tensors[0]
        if operation in ("quantize_rows", "level_values"):
            return all(map(is_plain, tensors))
        if operation == "unpack_signs":
            return True
        if x.dtype not in _DTYPES or x.shape[-1] > _MOST_INPUTS:
            return False
        return operation != "linear" or self.name != "portable" or x.numel() < _PORTABLE_ROWS * max(1, x.shape[-1])

    def linear(self, call: LinearCall) -> Tensor:
        """See `ops.linear_w1`, `linear_w1a8` and `linear_w1a1`; shapes match, as `dispatch` checks.

        Raises:
            PackedFormatError: for a tensor without data in the memory of the CPU.
        """
        activations, x, weight, scale, bias, levels, gelu, norm = call
        columns, rows = x.shape[-1], weight.shape[0]
        flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), columns)
        if flat.stride(1) != 1 or flat.is_neg():
            flat = flat.resolve_neg().contiguous()
        flat = aligned(flat)
        code = FORMATS.index(activations)
        tiles = self._tiles(code, weight, columns)
        result = x.new_empty((*x.shape[:-1], rows))
        held: list[Tensor] = []
        struct = LinearStruct(
            isa=self.isa,
            format=code,
            dtype=_DTYPES[x.dtype],
            rows=flat.shape[0],
            inputs=columns,
            outputs=rows,
            x=address_of(flat),
            x_stride=flat.stride(0),
            tiles=tiles.data_ptr(),
            scale=address_of_floats(scale, held),
            y=result.data_ptr(),
            parallel_for=parallel_for(),
            threads=torch.get_num_threads(),
        )
        # What is not set is 0.
        if bias is not None:
            struct.bias = address_of_floats(bias, held)
        if levels is not None:
            struct.levels = address_of_floats(levels, held)
        if gelu:
            struct.gelu = 1
        if norm is not None:
            struct.norm_weight = address_of_floats(norm.weight, held)
            struct.norm_bias = address_of_floats(norm.bias, held)
            struct.norm_eps = norm.eps
        self.library.proxbit_linear(struct)
        return result

    def _tiles(self, code: int, weight: Tensor, columns: int) -> Tensor:
        """The weight in the order of the kernel, made once for each weight and kept as long as it lives."""
        version = version_of(weight)
        key, state = (id(weight), code), (version, weight.data_ptr(), weight.shape, columns)
        known = self.tiles.get(key)
        if known is not None and known[0]() is weight and known[1] == state:
            return known[2]
        bits = within_storage(weight).contiguous()
        size = self.library.proxbit_tile_bytes(self.isa, code, len(bits), columns)
        if not size:
            return bits
        tiles = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.library.proxbit_repack(self.isa, code, address_of(bits), len(bits), columns, address_of(tiles))
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
            self.isa,
            _DTYPES[values.dtype],
            address_of(within_storage(values)),
            rows,
            columns,
            values.stride(0),
            bits.data_ptr(),
            parallel_for(),
        )
        return bits

    def unpack_signs(self, packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """See `packing.unpack_signs`."""
        values = torch.empty(len(packed), columns, dtype=torch.float32, device="cpu")
        bits = within_storage(packed).contiguous()
        self.library.proxbit_unpack_signs(
            self.isa, address_of(bits), len(bits), columns, values.data_ptr(), parallel_for()
        )
        return values.to(dtype)

    def quantize_rows(self, rows: LatentRows, scale: str) -> tuple[Tensor, Tensor, Tensor]:
        r"""The weight of the forward pass.

        Formula:
            w = a F_mu(W / s)

        Args:
            rows: their latent is one that `memory.is_plain` is true for.
            scale: what a is where it is not given: "ls", <F, W> / <F, F> of each row; "fixed", s.

        Returns:
            w, s and a.

        Raises:
            PackedFormatError: for a tensor without data, of another shape or of another dtype.
        """
        latent, divisor, factor = aligned(rows.latent), rows.divisor, rows.factor
        s = latent.new_empty(len(latent), 1) if divisor is None else aligned(divisor.contiguous())
        if factor is not None:
            a = aligned(factor.contiguous())
        else:
            a = s if scale == "fixed" else latent.new_empty(len(latent), 1)
        result, mu = torch.empty_like(latent), mu_of(rows.mu)
        find = divisor is None, factor is None and scale == "ls"
        self.library.proxbit_quantize(self._latent(LatentRows(rows.function, latent, mu, s, a), None, result, find))
        return result, s, a

    def gradient_rows(self, rows: LatentRows, grad: Tensor, overwrite: bool = False) -> Tensor:
        r"""The gradient of the latent weight.

        Formula:
            dL/dW = B_mu(W / s) (a / s) \odot dL/dw

        Args:
            rows: as above, with s and a.
            grad: dL/dw, `[rows, columns]`, in fp32.
            overwrite: whether the result may take the place of `grad`.

        Raises:
            PackedFormatError: for a tensor without data, of another shape or of another dtype.
        """
        assert rows.divisor is not None and rows.factor is not None
        # Variables, here and above, so that what is copied lives as long as the call reads it.
        latent, mu = aligned(rows.latent), mu_of(rows.mu)
        s, a, grad = (aligned(each.resolve_neg().contiguous()) for each in (rows.divisor, rows.factor, grad))
        result = grad if overwrite else torch.empty_like(latent)
        self.library.proxbit_gradient(
            self._latent(LatentRows(rows.function, latent, mu, s, a), grad, result, (False, False))
        )
        return result

    def _latent(self, rows: LatentRows, grad: Tensor | None, result: Tensor, find: tuple[bool, bool]) -> LatentStruct:
        """The call; of `rows`, everything is given."""
        latent, a_row = rows.latent, (len(rows.latent), 1)
        for tensor, shape in ((grad, latent.shape), (rows.divisor, a_row), (rows.factor, a_row)):
            if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
                raise PackedFormatError(
                    f"Latent weights {list(latent.shape)} go with {list(shape)} in fp32, not {list(tensor.shape)} in "
                    f"{tensor.dtype}."
                )
        return LatentStruct(
            isa=self.isa,
            function=FUNCTIONS.index(rows.function),
            rows=latent.shape[0],
            columns=latent.shape[1],
            mu=_checked(rows.mu),
            latent=_checked(latent),
            grad=_checked(grad),
            divisor=_checked(rows.divisor),
            factor=_checked(rows.factor),
            result=_checked(result),
            find_divisor=find[0],
            find_factor=find[1],
            parallel_for=parallel_for(),
        )

    def level_values(self, levels: Levels, x: Tensor, scale: Tensor | None, threshold: Tensor | None) -> Tensor:
        """Scale times code.

        Args:
            levels: see there.
            x: `[..., I]`; one that `memory.is_plain` is true for, as are the others.
            scale: `[1]`; None for int8.
            threshold: `[I]`; None but for two levels.

        Returns:
            Same shape.

        Raises:
            PackedFormatError: for a tensor without data, of another shape or of another dtype.
        """
        values = torch.empty_like(x)
        self._activations(levels, x, scale, threshold, values)
        return values

    def level_gradient(
        self,
        levels: Levels,
        x: Tensor,
        scale: Tensor | None,
        threshold: Tensor | None,
        values: Tensor,
        grad: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The values once more, and gradients.

        Args:
            levels: as above, and x, scale and threshold too.
            x: as above.
            scale: as above.
            threshold: as above.
            values: becomes those; same shape as x.
            grad: of the values; becomes that of x in place.

        Returns:
            Those of the scale and of the threshold.

        Raises:
            PackedFormatError: for a tensor without data, of another shape or of another dtype.
        """
        if scale is None:
            self._activations(levels, x, None, None, values)  # straight through
            return None, None
        sums = x.new_empty(-(-len(x) // PART_ROWS), x.shape[1] + 1)
        self._activations(levels, x, scale, threshold, values, grad, sums)
        total = sums.sum(0)
        return total[-1:], None if threshold is None else -total[:-1]

    def _activations(
        self,
        levels: Levels,
        x: Tensor,
        scale: Tensor | None,
        threshold: Tensor | None,
        values: Tensor,
        grad: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        columns, shape = x.shape[-1], tuple(x.shape)
        for name, tensor, expected in (
            ("scale", scale, (1,)),
            ("threshold", threshold, (columns,)),
            ("values", values, shape),
            ("gradient", grad, shape),
        ):
            if tensor is not None and (
                tensor.shape != expected or tensor.dtype != torch.float32 or not tensor.is_contiguous()
            ):
                raise PackedFormatError(
                    f"The {name} of activations {list(shape)} must be {list(expected)} in fp32, contiguous; not "
                    f"{list(tensor.shape)} in {tensor.dtype}."
                )
        kind, forward, backward, mu, codes = levels
        if (kind != "int8") != (scale is not None) or (kind in KINDS[2:]) != (threshold is not None):
            raise PackedFormatError(f"int8 has no scale, and only two levels have a threshold: not so for {kind!r}.")
        number = mu_of(x.new_zeros(()) if mu is None else mu)
        self.library.proxbit_activations(
            ActivationsStruct(
                isa=self.isa,
                kind=KINDS.index(kind),
                forward=-1 if forward is None else FUNCTIONS.index(forward),
                backward=FUNCTIONS.index(backward),
                lowest=codes[0],
                highest=codes[1],
                rows=x.numel() // columns,
                columns=columns,
                mu=_checked(number),
                scale=_checked(scale),
                threshold=_checked(threshold),
                x=_checked(x),
                values=_checked(values),
                grad=_checked(grad),
                sums=_checked(sums),
                parallel_for=parallel_for(),
            )
        )


def _checked(tensor: Tensor | None) -> int:
    """The address of a tensor that is all there."""
    return 0 if tensor is None else address_of(within_storage(tensor))


def isas(path: Path) -> dict[str, CpuBackend]:
    """A library at each ISA that this processor runs, by name, fastest first."""
    library = open_library(path)
    found: dict[str, CpuBackend] = {}
    index = 0
    while name := library.proxbit_isa_name(index):
        if library.proxbit_isa_runs(index):
            found[name.decode()] = CpuBackend(path, name.decode(), index, library)
        index += 1
    return found


def choose(path: Path | None, environment: Mapping[str, str]) -> CpuBackend | None:
    """The ISA to run: the fastest, or the one that the environment variable PROXBIT_ISA names.

    Returns:
        None for the reference.

    Raises:
        ConfigError: if PROXBIT_ISA names one that this machine does not run, or the library is of another version.
    """
    wanted = environment.get(_ISA_VARIABLE)
    if wanted == _REFERENCE:
        return None
    found = {} if path is None else isas(path)
    if wanted and wanted not in found:
        valid = ", ".join([*found, _REFERENCE])
        raise ConfigError(f"{_ISA_VARIABLE} is {wanted!r}; this machine and this installation run: {valid}.")
    if not found:
        warnings.warn(
            "proxbit was installed without its compiled kernels (no C++ compiler was found): packed layers run on the "
            "plain torch reference, which is slow. Install a compiler, then: pip install --force-reinstall proxbit",
            stacklevel=2,
        )
        return None
    return found[wanted] if wanted else next(iter(found.values()))


@cache
def native() -> CpuBackend | None:
    """The compiled kernels that this process uses, or None where it uses the reference."""
    return choose(find_library([str(Path(__file__).parent), *sys.modules[__package__].__path__]), os.environ)
