"""Packing signs into bits and back, in plain torch."""

import torch
from torch import Tensor

from proxbit.packing.layout import BITS_PER_BYTE, check_bits, packed_columns
from proxbit.shards import on_rows
from proxbit.sign import is_positive

__all__ = ["pack_signs", "unpack_signs"]


def pack_signs(values: Tensor) -> Tensor:
    r"""Pack the signs of a matrix into bytes along the last axis.

    Formula:
        byte[o, j] = \sum_{b=0}^{7} 1[values[o, 8 j + b] \ge 0] 2^b      (columns past the end count as 0)

    Args:
        values: `[O, I]`, floating point, any device; of a DTensor, each process packs the rows it has.

    Returns:
        `[O, ceil(I / 8)]`, uint8, same device; spread over processes as the rows are.

    Examples:
        >>> pack_signs(torch.tensor([[1.0, -1.0, 0.5]]))
        tensor([[5]], dtype=torch.uint8)
    """
    return on_rows(_pack, values)


def _pack(values: Tensor) -> Tensor:
    rows, columns = values.shape
    width = packed_columns(columns)
    bits = torch.zeros(rows, width * BITS_PER_BYTE, dtype=torch.uint8, device=values.device)
    bits[:, :columns] = is_positive(values)
    bits = bits.view(rows, width, BITS_PER_BYTE)
    packed = torch.zeros(rows, width, dtype=torch.uint8, device=values.device)
    for bit in range(BITS_PER_BYTE):
        packed |= bits[:, :, bit] << bit
    return packed


def unpack_signs(packed: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `pack_signs`.

    Args:
        packed: `[O, ceil(columns / 8)]`, uint8.
        columns: `I`, the number of columns before packing.
        dtype: of the result.

    Returns:
        `[O, I]` of -1 and +1, in `dtype`, same device, contiguous.

    Raises:
        PackedFormatError: for another dtype or shape.

    Examples:
        >>> unpack_signs(torch.tensor([[5]], dtype=torch.uint8), columns=3)
        tensor([[ 1., -1.,  1.]])
    """
    check_bits(packed, columns)
    bytes_, places = torch.arange(256, device=packed.device), torch.arange(BITS_PER_BYTE, device=packed.device)
    bits = torch.bitwise_right_shift(bytes_.unsqueeze(1), places) & 1
    table = bits.to(dtype) * 2 - 1
    return torch.nn.functional.embedding(packed.int(), table).flatten(1)[:, :columns].contiguous()
