"""The packed format: its sizes, and the checks that keep damaged weights out."""

import math

import pytest
import torch

from proxbit.errors import PackedFormatError
from proxbit.packing import BITS_PER_BYTE, check_packed, packed_columns, unpack_signs

WIDTHS = {0: 0, 1: 1, 7: 1, 8: 1, 9: 2, 31: 4, 32: 4, 33: 5, 63: 8, 64: 8, 65: 9, 768: 96, 3072: 384}


@pytest.fixture
def weight():
    """Three rows of 11 columns: 5 padding bits, all 0."""
    return torch.tensor([[255, 0b111], [0, 0], [0b1010_0101, 0b100]], dtype=torch.uint8)


@pytest.fixture
def scale():
    return torch.tensor([0.5, 2.0, 0.0])


def test_bytes_a_row():
    assert BITS_PER_BYTE == 8
    assert {columns: packed_columns(columns) for columns in WIDTHS} == WIDTHS


def test_a_valid_weight_passes(weight, scale):
    check_packed(weight, scale, columns=11)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        check_packed(weight, scale.to(dtype), columns=11)


@pytest.mark.parametrize("columns", [9, 10, 11, 16])
def test_the_padding_is_what_the_columns_leave(columns, scale):
    """A bit at column 10 is data from 11 columns on, and damage before; 16 columns have no padding."""
    weight = torch.tensor([[0, 0], [0, 0b100], [0, 0]], dtype=torch.uint8)
    if columns >= 11:
        check_packed(weight, scale, columns)
    else:
        with pytest.raises(PackedFormatError, match=f"the {16 - columns} padding bits"):
            check_packed(weight, scale, columns)


def test_whole_bytes_have_no_padding():
    for columns in (8, 16, 64):
        check_packed(torch.full((2, columns // 8), 255, dtype=torch.uint8), torch.ones(2), columns)


@pytest.mark.parametrize("bit", [3, 7])
def test_any_padding_bit_is_found_and_its_row_named(weight, scale, bit):
    weight[1, 1] = 1 << bit
    with pytest.raises(PackedFormatError, match=r"here: the 5 padding bits .* must be 0, row 1 has others"):
        check_packed(weight, scale, columns=11, name="here")


def test_the_first_damaged_row_is_named(weight, scale):
    weight[1:, 1] = 0b1000_0000
    with pytest.raises(PackedFormatError, match="row 1 has others"):
        check_packed(weight, scale, columns=11)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
def test_dtype_of_the_bits(weight, scale, dtype):
    with pytest.raises(PackedFormatError, match=f"here: packed weights are uint8, not {dtype}"):
        check_packed(weight.to(dtype), scale, columns=11, name="here")


@pytest.mark.parametrize(
    ("columns", "shape"),
    [(8, (3, 2)), (17, (3, 2)), (11, (3, 1)), (11, (3, 11)), (11, (6,)), (11, (3, 1, 2)), (11, (3, 0))],
    ids=str,
)
def test_shape_of_the_bits(columns, shape, scale):
    width = -(-columns // 8)
    with pytest.raises(
        PackedFormatError, match=rf"here: {columns} columns pack into \[rows, {width}\] bytes"
    ) as caught:
        check_packed(torch.zeros(shape, dtype=torch.uint8), scale, columns, name="here")
    assert f"the tensor is {list(shape)}" in str(caught.value)


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), ()], ids=str)
def test_shape_of_the_scales(weight, shape):
    with pytest.raises(PackedFormatError) as caught:
        check_packed(weight, torch.ones(shape), columns=11, name="here")
    assert f"here: weight_scale must be one number a row, [3], not {list(shape)}." in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "dtype"), [(math.nan, torch.float16), (math.inf, torch.bfloat16), (-math.inf, torch.float32)], ids=str
)
def test_scales_are_finite(weight, scale, bad, dtype):
    scale[2] = bad
    with pytest.raises(PackedFormatError, match=f"here: weight_scale must be finite, row 2 is {bad}"):
        check_packed(weight, scale.to(dtype), columns=11, name="here")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_scales_are_floating_point(weight, scale, dtype):
    """An integer scale would be applied without complaint, and round every other tensor that meets it."""
    with pytest.raises(PackedFormatError, match=f"weight_scale must be floating point, not {dtype}"):
        check_packed(weight, scale.to(dtype), columns=11)


def test_the_weight_has_a_name_in_messages_by_default(weight, scale):
    with pytest.raises(PackedFormatError, match="^packed weight: "):
        check_packed(weight.int(), scale, columns=11)


def test_checking_changes_nothing(weight, scale):
    before = weight.clone(), scale.clone()
    check_packed(weight, scale, columns=11)
    assert torch.equal(weight, before[0])
    assert torch.equal(scale, before[1])


def test_offsets_are_numbers_of_any_sign(weight, scale):
    check_packed(weight, scale, columns=11, weight_offset=torch.tensor([-1.5, 0.0, 3.0]))


def test_offsets_are_checked_as_the_scales_are(weight, scale):
    for offset, message in (
        (torch.ones(3, 1), r"here: weight_offset must be one number a row, \[3\], not \[3, 1\]\."),
        (torch.tensor([0.0, math.nan, 0.0]), "here: weight_offset must be finite, row 1 is nan"),
        (torch.ones(3, dtype=torch.int64), "weight_offset must be floating point, not torch.int64"),
    ):
        with pytest.raises(PackedFormatError, match=message):
            check_packed(weight, scale, 11, "here", offset)


@pytest.mark.parametrize("bits", [torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.uint8)], ids=str)
def test_what_is_unpacked_is_bytes(bits):
    with pytest.raises(PackedFormatError, match=r"12 columns of signs are uint8 \[rows, 2\], not"):
        unpack_signs(bits, 12)


@pytest.mark.parametrize("columns", [-3, 7, 17, 40])
def test_columns_are_as_many_as_were_packed(columns):
    with pytest.raises(PackedFormatError, match=f"{columns} columns of signs are uint8"):
        unpack_signs(torch.zeros(3, 2, dtype=torch.uint8), columns)
