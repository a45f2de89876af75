"""The packed 1-bit format: its layout, and plain torch functions from and to it."""

from proxbit.packing.bitpack import pack_signs, unpack_signs
from proxbit.packing.layout import BITS_PER_BYTE, check_bits, check_packed, packed_columns

__all__ = ["BITS_PER_BYTE", "check_bits", "check_packed", "pack_signs", "packed_columns", "unpack_signs"]
