"""The plain torch implementations, against dense products in double precision."""

import numpy as np
import pytest
import torch

from proxbit.kernels import LinearCall, reference
from proxbit.packing import pack_signs

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COLUMNS = [1, 7, 8, 9, 31, 32, 33, 63, 64, 65]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Each width with one dtype.
paired = pytest.mark.parametrize(
    ("columns", "dtype"), [(width, DTYPES[i % 4]) for i, width in enumerate(COLUMNS)], ids=str
)


def linear_w1(*tensors):
    return reference.linear(LinearCall("float", *tensors))


def packed_layer(rows, columns, dtype=torch.float32):
    """Random bits with their dense weight in double precision, and scales that are exact in every dtype."""
    values = torch.randn(rows, columns)
    scale = torch.arange(1, rows + 1).to(dtype) / 4
    dense = np.where(values.numpy() >= 0, 1.0, -1.0) * scale.double().numpy()[:, None]
    return pack_signs(values), scale, dense


@paired
def test_linear_is_the_dense_product(columns, dtype):
    weight, scale, dense = packed_layer(5, columns, dtype)
    x = torch.randn(3, columns).to(dtype)
    bias = torch.randn(5).to(dtype) if columns % 2 else None
    result = linear_w1(x, weight, scale, bias)
    assert result.dtype == dtype
    expected = x.double().numpy() @ dense.T + (0 if bias is None else bias.double().numpy())
    sums = 1e-13 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(
        result.double().numpy(), expected, rtol=max(sums, torch.finfo(dtype).eps), atol=sums * columns
    )


@paired
def test_whole_numbers_are_exact(columns, dtype):
    """Sums of small whole numbers have no rounding in fp32, and these fit every dtype."""
    weight, scale, dense = packed_layer(4, columns)
    x = torch.randint(-1, 2, (6, columns)).to(dtype)
    result = linear_w1(x, weight, torch.full_like(scale, 2.0), None)
    expected = x.double().numpy() @ (dense / scale.double().numpy()[:, None] * 2).T
    np.testing.assert_array_equal(result.double().numpy(), expected)


@dtypes
def test_a_grid_rounds_and_clips(dtype):
    """Halves to even; bounds beyond one byte, or on one side of zero, are moved to where the sums are right."""
    x = torch.tensor([[-99.0, -2.5, -1.5, -0.5, 0.5, 1.5, 6.75, 99.0]]).to(dtype) * 2
    for low, high in ((-8, 7), (0, 15), (-1e9, 1e9), (3, -3)):
        q, step = reference.quantize_activations(x, torch.tensor([2.0, low, high]))
        bounds = max(min(low, 0), -127), min(max(high, 0), 127)
        expected = np.clip(np.round(x.double().numpy() / 2), *bounds)
        np.testing.assert_array_equal(q.numpy(), expected)
        assert (q.dtype, step.tolist()) == (torch.float32, [[2.0]])


def test_only_nan_spoils_a_row_on_a_grid():
    weight, scale, dense = packed_layer(4, 3)
    x = torch.tensor([[torch.inf, 0, 0], [0, torch.nan, 0], [0, 0, -torch.inf]])
    result = reference.linear(LinearCall("int8", x, weight, scale, None, torch.tensor([0.5, -8, 7])))
    levels = np.array([[3.5, 0, 0], [0, np.nan, 0], [0, 0, -4.0]])
    np.testing.assert_allclose(result.numpy(), levels @ dense.T, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_single_precision(dtype):
    """2048 ones and one more: in fp16 and bf16 the sum would stop before it gets there."""
    columns = 4096
    weight = pack_signs(torch.ones(1, columns))
    result = linear_w1(torch.ones(1, columns, dtype=dtype), weight, torch.tensor([2.0**-12]), None)
    assert result.tolist() == [[1.0]]
    back = reference.linear_w1_grad_input(
        torch.ones(1, columns, dtype=dtype), pack_signs(torch.ones(columns, 1)), torch.full((columns,), 2.0**-12), 1
    )
    assert back.tolist() == [[1.0]]


@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_any_leading_shape(leading):
    weight, scale, dense = packed_layer(5, 11)
    x = torch.randn(*leading, 11)
    result = linear_w1(x, weight, scale, None)
    assert result.shape == (*leading, 5)
    np.testing.assert_allclose(result.numpy(), x.numpy() @ dense.T, rtol=1e-5, atol=1e-5)


def test_scale_and_bias_may_have_another_dtype():
    """Layers keep scales in fp32 under bf16 activations; the result has the dtype of the input."""
    weight, scale, dense = packed_layer(5, 11)
    x, bias = torch.randn(3, 11).bfloat16(), torch.randn(5)
    result = linear_w1(x, weight, scale, bias)
    assert result.dtype == torch.bfloat16
    expected = x.double().numpy() @ dense.T + bias.double().numpy()
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=2**-8, atol=1e-5)


@paired
def test_grad_input_is_the_transposed_product(columns, dtype):
    weight, scale, dense = packed_layer(5, columns, dtype)
    grad = torch.randn(2, 3, 5).to(dtype)
    result = reference.linear_w1_grad_input(grad, weight, scale, columns)
    assert result.dtype == dtype
    sums = 1e-13 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(
        result.double().numpy(), grad.double().numpy() @ dense, rtol=max(sums, torch.finfo(dtype).eps), atol=sums * 10
    )


@paired
def test_unpacked_weight_is_exact(columns, dtype):
    weight, scale, dense = packed_layer(5, columns, dtype)
    result = reference.unpack_weight(weight, scale, columns)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result.double().numpy(), dense)


def test_by_hand():
    weight = torch.tensor([[0b101], [0b010]], dtype=torch.uint8)
    scale, bias = torch.tensor([0.5, 2.0]), torch.tensor([10.0, -10.0])
    x = torch.tensor([[1.0, 2.0, 4.0]])
    assert linear_w1(x, weight, scale, bias).tolist() == [[11.5, -16.0]]
    assert reference.linear_w1_grad_input(torch.tensor([[2.0, 1.0]]), weight, scale, 3).tolist() == [[-1, 1, -1]]
    assert reference.unpack_weight(weight, scale, 3).tolist() == [[0.5, -0.5, 0.5], [-2, 2, -2]]


def test_negative_and_zero_scales():
    """A scale of any sign is applied as it is."""
    weight = pack_signs(torch.ones(2, 3))
    result = linear_w1(torch.ones(1, 3), weight, torch.tensor([-1.0, 0.0]), None)
    assert result.tolist() == [[-3.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_quantized_activations_are_those_of_single_precision(dtype):
    """One division, one product, one rounding: short mantissas meet halves often, where another rounding shows."""
    x = torch.randn(3000, 40).to(dtype)
    q, step = reference.quantize_activations(x)
    numbers, top = x.float().numpy(), np.float32(127)
    peak = np.abs(numbers).max(axis=1, keepdims=True)
    np.testing.assert_array_equal(q.numpy(), np.rint(numbers * (top / peak)))
    np.testing.assert_array_equal(step.numpy(), peak / top)
