"""The packed format, in one place: what the bytes of a 1-bit weight mean, and what a valid one looks like.

A weight of `O` rows and `I` columns, of values in {-1, +1}, is stored as

    weight         uint8   [O, ceil(I / 8)]   bit b of byte j is column 8 j + b (least significant bit first);
                                              1 is +1, 0 is -1; the padding bits of the last byte are 0
    weight_scale   float   [O]                the row scale: w = weight_scale * (+-1)
    weight_offset  float   [O]                where levels are not opposite: w = weight_offset + weight_scale * (+-1)
"""

import torch
from torch import Tensor

from proxbit.errors import PackedFormatError

__all__ = ["BITS_PER_BYTE", "check_bits", "check_packed", "packed_columns"]

BITS_PER_BYTE = 8


def packed_columns(columns: int) -> int:
    """Bytes a row of `columns` bits takes: ceil(columns / 8)."""
    return -(-columns // BITS_PER_BYTE)


def check_bits(packed: Tensor, columns: int) -> None:
    """Check that a tensor has the dtype and the shape of `columns` packed columns.

    Raises:
        PackedFormatError: saying what would be valid.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 2 or columns < 0 or packed_columns(columns) != packed.shape[1]:
        raise PackedFormatError(
            f"{columns} columns of signs are uint8 [rows, {packed_columns(columns)}], not {packed.dtype} "
            f"{list(packed.shape)}."
        )


def check_packed(
    weight: Tensor,
    weight_scale: Tensor,
    columns: int,
    name: str = "packed weight",
    weight_offset: Tensor | None = None,
) -> None:
    """Check that a packed weight keeps the format.

    Args:
        weight: expected uint8, `[rows, ceil(columns / 8)]`.
        weight_scale: expected floating point, `[rows]`, finite.
        columns: columns before packing.
        name: how to call the weight in messages, such as the module's name.
        weight_offset: expected None, or floating point, `[rows]`, finite.

    Raises:
        PackedFormatError: naming the weight, what is wrong and what would be valid.
    """
    if weight.dtype != torch.uint8:
        raise PackedFormatError(f"{name}: packed weights are uint8, not {weight.dtype}.")
    width = packed_columns(columns)
    if weight.dim() != 2 or weight.shape[1] != width:
        raise PackedFormatError(
            f"{name}: {columns} columns pack into [rows, {width}] bytes, but the tensor is {list(weight.shape)}."
        )
    used = columns % BITS_PER_BYTE
    if used and bool((weight[:, -1] >> used).any()):
        row = int((weight[:, -1] >> used).nonzero()[0, 0])
        raise PackedFormatError(
            f"{name}: the {BITS_PER_BYTE - used} padding bits at the end of each row must be 0, row {row} has others: "
            "the file is damaged or was packed with another bit order."
        )
    _check_numbers(weight_scale, len(weight), f"{name}: weight_scale")
    if weight_offset is not None:
        _check_numbers(weight_offset, len(weight), f"{name}: weight_offset")


def _check_numbers(numbers: Tensor, rows: int, name: str) -> None:
    """One finite number a row."""
    if numbers.shape != (rows,):
        raise PackedFormatError(f"{name} must be one number a row, [{rows}], not {list(numbers.shape)}.")
    if not numbers.is_floating_point():
        raise PackedFormatError(f"{name} must be floating point, not {numbers.dtype}.")
    if not bool(torch.isfinite(numbers).all()):
        row = int((~torch.isfinite(numbers)).nonzero()[0, 0])
        raise PackedFormatError(f"{name} must be finite, row {row} is {numbers[row].item()}.")
