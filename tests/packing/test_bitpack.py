"""Packing signs into bits: bytes by hand, every bit, the padding, and the way back."""

import math

import numpy as np
import pytest
import torch

from proxbit.packing import pack_signs, unpack_signs

WIDTHS = [1, 7, 8, 9, 31, 32, 33, 63, 64, 65]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
widths = pytest.mark.parametrize("columns", WIDTHS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BY_HAND = {
    "one-plus": ([1.0], [0b1]),
    "one-minus": ([-1.0], [0b0]),
    "first-column-is-bit-0": ([1.0, -1, -1, -1, -1, -1, -1, -1], [0b0000_0001]),
    "last-column-is-bit-7": ([-1.0, -1, -1, -1, -1, -1, -1, 1], [0b1000_0000]),
    "all-plus": ([3.0] * 8, [0xFF]),
    "padded": ([-0.5, 0.5, 0.5], [0b110]),
    "second-byte": ([-1.0] * 8 + [2.0], [0, 1]),
    "mixed": ([1.0, 1, -1, -1, 1, -1, 1, -1, -1, 1], [0b0101_0011, 0b10]),
}


@dtypes
def test_bytes_by_hand(dtype):
    for what, (row, expected) in BY_HAND.items():
        packed = pack_signs(torch.tensor([row], dtype=dtype))
        assert packed.dtype == torch.uint8
        assert packed.tolist() == [expected], what


@widths
def test_a_single_plus_is_a_single_bit(columns):
    """The identity matrix with -1 for 0: row i packs to the number 2^i, little-endian."""
    packed = pack_signs(2 * torch.eye(columns) - 1)
    assert [int.from_bytes(bytes(row), "little") for row in packed.tolist()] == [2**i for i in range(columns)]


def test_padding_bits_are_zero_even_if_all_columns_are_plus():
    for columns in WIDTHS:
        packed = pack_signs(torch.ones(3, columns)).tolist()
        assert [int.from_bytes(bytes(row), "little") for row in packed] == [2**columns - 1] * 3


@widths
def test_numpy_packs_the_same_bytes(columns):
    values = torch.randn(4, columns)
    expected = np.packbits(values.numpy() >= 0, axis=1, bitorder="little")
    np.testing.assert_array_equal(pack_signs(values).numpy(), expected)


@pytest.mark.parametrize(("columns", "dtype"), [(width, DTYPES[i % 4]) for i, width in enumerate(WIDTHS)], ids=str)
def test_unpack_is_the_inverse(columns, dtype):
    values = torch.randn(6, columns).to(dtype)
    values[0, 0] = 0.0
    result = unpack_signs(pack_signs(values), columns, dtype)
    assert result.dtype == dtype
    assert result.shape == (6, columns) and result.is_contiguous()
    assert result.tolist() == [[1.0 if value >= 0 else -1.0 for value in row] for row in values.tolist()]


def test_pack_is_the_inverse_of_unpack():
    """Any bytes whose padding is 0."""
    for columns in WIDTHS:
        packed = torch.randint(0, 256, (7, math.ceil(columns / 8)), dtype=torch.uint8)
        packed[:, -1] &= 0xFF >> (-columns % 8)
        assert torch.equal(pack_signs(unpack_signs(packed, columns)), packed)


def test_unpack_by_hand():
    packed = torch.tensor([[0b0101_0011, 0b10], [0, 0]], dtype=torch.uint8)
    assert unpack_signs(packed, 10).tolist() == [[1, 1, -1, -1, 1, -1, 1, -1, -1, 1], [-1] * 10]
    assert unpack_signs(packed, 10).dtype == torch.float32


def test_all_bytes_unpack():
    packed = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    expected = [[1.0 if byte >> bit & 1 else -1.0 for bit in range(8)] for byte in range(256)]
    assert unpack_signs(packed, 8).tolist() == expected


@dtypes
def test_special_values(dtype):
    """0 and -0.0 pack as +1, infinities by their sign, the smallest numbers too."""
    tiny = torch.finfo(dtype).smallest_normal
    values = torch.tensor([[0.0, -0.0, math.inf, -math.inf, tiny, -tiny, math.nan]], dtype=dtype)
    assert pack_signs(values).tolist() == [[0b001_0111]]


@pytest.mark.parametrize("columns", [1, 8, 33, 65])
def test_views_pack_like_their_copies(columns):
    base = torch.randn(columns + 2, 9)
    for view in (base[1:-1].t(), base.t()[:, 2:], base.t()[::2, 1:-1]):
        assert not view.is_contiguous() or columns == 1
        packed = pack_signs(view)
        assert packed.is_contiguous()
        assert torch.equal(packed, pack_signs(view.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("columns", [1, 8, 33, 65])
def test_views_unpack_like_their_copies(columns):
    width = math.ceil(columns / 8)
    base = torch.randint(0, 256, (2 * width, 6), dtype=torch.uint8)
    view = base.t()[:, width:]
    assert torch.equal(unpack_signs(view, columns), unpack_signs(view.contiguous(), columns))


def test_no_rows():
    assert pack_signs(torch.empty(0, 9)).shape == (0, 2)
    assert unpack_signs(torch.empty(0, 2, dtype=torch.uint8), 9).shape == (0, 9)


def test_the_input_is_untouched():
    values = torch.randn(3, 9)
    packed = pack_signs(values)
    before, bytes_before = values.clone(), packed.clone()
    pack_signs(values)
    unpack_signs(packed, 9).zero_()
    assert torch.equal(values, before)
    assert torch.equal(packed, bytes_before)


def test_a_latent_parameter_can_be_packed():
    """Bits carry no gradient."""
    assert not pack_signs(torch.nn.Parameter(torch.randn(2, 3))).requires_grad
