"""The packed format, in one place: what the bytes of a 1-bit weight mean, and what a valid one looks like.

A weight of `O` rows and `I` columns, of values in {-1, +1}, is stored as

    weight         uint8   [O, ceil(I / 8)]   bit b of byte j is column 8 j + b (least significant bit first);
                                              1 is +1, 0 is -1; the padding bits of the last byte are 0
    weight_scale   float   [O]                the row scale: w = weight_scale * (+-1)
"""

import torch
from torch import Tensor

from proxbit.errors import PackedFormatError

__all__ = ["BITS_PER_BYTE", "check_packed", "packed_columns"]

BITS_PER_BYTE = 8


def packed_columns(columns: int) -> int:
    """Bytes a row of `columns` bits takes: ceil(columns / 8)."""
    return -(-columns // BITS_PER_BYTE)


def check_packed(weight: Tensor, weight_scale: Tensor, columns: int, name: str = "packed weight") -> None:
    """Check that a packed weight keeps the format.

    Args:
        weight: expected uint8, `[rows, ceil(columns / 8)]`.
        weight_scale: expected floating point, `[rows]`, finite.
        columns: columns before packing.
        name: how to call the weight in messages, such as the module's name.

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
    if weight_scale.shape != weight.shape[:1]:
        raise PackedFormatError(
            f"{name}: expected one scale a row, [{weight.shape[0]}], but weight_scale is {list(weight_scale.shape)}."
        )
    if not weight_scale.is_floating_point():
        raise PackedFormatError(f"{name}: weight_scale must be floating point, not {weight_scale.dtype}.")
    used = columns % BITS_PER_BYTE
    if used and bool((weight[:, -1] >> used).any()):
        row = int((weight[:, -1] >> used).nonzero()[0, 0])
        raise PackedFormatError(
            f"{name}: the {BITS_PER_BYTE - used} padding bits at the end of each row must be 0, row {row} has others: "
            "the file is damaged or was packed with another bit order."
        )
    if not bool(torch.isfinite(weight_scale).all()):
        row = int((~torch.isfinite(weight_scale)).nonzero()[0, 0])
        raise PackedFormatError(f"{name}: weight_scale must be finite, row {row} is {weight_scale[row].item()}.")
