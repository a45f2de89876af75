"""The one sign of the project."""

import math

import pytest
import torch

from proxbit.sign import is_positive, reaches, sign

VALUES = {
    "zero": (0.0, 1.0),
    "negative-zero": (-0.0, 1.0),
    "one": (1.0, 1.0),
    "minus-one": (-1.0, -1.0),
    "tiny": (6e-8, 1.0),
    "minus-tiny": (-6e-8, -1.0),
    "inf": (math.inf, 1.0),
    "minus-inf": (-math.inf, -1.0),
    "nan": (math.nan, -1.0),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("value", "expected"), VALUES.values(), ids=VALUES)
def test_values(value, expected, dtype):
    values = torch.full((2, 3), value, dtype=dtype)
    result = sign(values)
    assert result.dtype == dtype
    assert result.tolist() == [[expected] * 3] * 2
    positive = is_positive(values)
    assert positive.dtype == torch.bool
    assert positive.tolist() == [[expected > 0] * 3] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_numbers_keep_their_sign(dtype):
    smallest = torch.finfo(dtype).smallest_normal
    assert sign(torch.tensor([smallest, -smallest], dtype=dtype)).tolist() == [1.0, -1.0]


def test_against_the_number_line():
    values = torch.randn(7, 5, 3, dtype=torch.float64)
    expected = [math.copysign(1.0, value) for value in values.flatten().tolist()]
    assert sign(values).shape == (7, 5, 3)
    assert sign(values).flatten().tolist() == expected


def test_scalars_and_empty_tensors():
    assert sign(torch.tensor(-3.0)).item() == -1.0
    assert sign(torch.empty(0, 4)).shape == (0, 4)


def test_views_are_read_where_they_are():
    base = torch.tensor([[9.0, -9.0, 9.0], [-9.0, 9.0, -9.0]])
    assert sign(base.t()[1:]).tolist() == [[-1.0, 1.0], [1.0, -1.0]]


def test_the_input_is_untouched():
    values = torch.tensor([-2.0, 0.0, 2.0])
    sign(values)
    assert values.tolist() == [-2.0, 0.0, 2.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_a_boundary_on(dtype):
    """One for all, or one a column; what is exactly at it reaches it."""
    values = torch.tensor([[1.0, -2.0, math.nan], [1.5, 0.5, math.inf]], dtype=dtype, requires_grad=True)
    assert reaches(values, 1).tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]
    boundary = torch.tensor([1.5, -2.0, 9.0], dtype=dtype)
    assert reaches(values, boundary).tolist() == [[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    assert sign(values, boundary).tolist() == [[-1.0, 1.0, -1.0], [1.0, 1.0, 1.0]]
    assert not reaches(values, boundary).requires_grad and reaches(values, 1).dtype == dtype
