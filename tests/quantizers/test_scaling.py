"""Row normalisation and row scales."""

import numpy as np
import pytest
import torch

from proxbit.errors import ConfigError
from proxbit.quantizers.scaling import NORMALIZATIONS, SCALES, check_scaling, normalizer, output_scale
from proxbit.sign import sign


@pytest.fixture
def rows():
    """Rows whose sizes differ by powers of ten."""
    return torch.randn(6, 11, dtype=torch.float64) * 10.0 ** torch.arange(-3, 3, dtype=torch.float64).unsqueeze(1)


@pytest.fixture
def soft(rows):
    return torch.tanh(rows / rows.abs().mean(dim=1, keepdim=True))


def test_normalizers_by_hand():
    rows = torch.tensor([[1.0, -3.0], [0.5, 0.0]])
    assert normalizer(rows, "row").tolist() == [[2.0], [0.25]]
    assert normalizer(rows, "tensor").tolist() == [[1.125], [1.125]]
    assert normalizer(rows, "none").tolist() == [[1.0], [1.0]]


def test_row_normalisation_gives_rows_of_size_one(rows):
    units = rows / normalizer(rows, "row")
    np.testing.assert_allclose(units.abs().mean(dim=1).numpy(), np.ones(6), rtol=1e-14)


def test_tensor_normalisation_gives_a_tensor_of_size_one_and_keeps_proportions(rows):
    units = rows / normalizer(rows, "tensor")
    assert units.abs().mean().item() == pytest.approx(1, rel=1e-14)
    np.testing.assert_allclose((units[4] / units[1, 0]).numpy(), (rows[4] / rows[1, 0]).numpy(), rtol=1e-13)


@pytest.mark.parametrize("factor", [2.0**-40, 0.125, 1024.0], ids=["tiny", "small", "large"])
def test_row_scaling_changes_nothing_in_units(rows, factor):
    """Powers of two, so that the equality is exact."""
    factors = torch.tensor([factor, 1, factor, 1, factor, factor], dtype=torch.float64).unsqueeze(1)
    scaled = rows * factors
    assert torch.equal(scaled / normalizer(scaled, "row"), rows / normalizer(rows, "row"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_zero_rows_stay_finite_and_dtype_is_kept(normalize, scale, dtype):
    rows = torch.zeros(3, 5, dtype=dtype)
    divisor = normalizer(rows, normalize)
    assert divisor.shape == (3, 1)
    assert divisor.dtype == dtype
    units = rows / divisor
    assert torch.isfinite(units).all()
    for quantized in (units, sign(units)):
        factor = output_scale(rows, quantized, divisor, scale)
        assert factor.shape == (3, 1)
        assert torch.isfinite(factor).all()
        assert not (quantized * factor / 2).isnan().any()


def test_least_squares_scale_is_the_regression_of_the_row(rows, soft):
    factor = output_scale(rows, soft, normalizer(rows, "row"), "ls")
    for row, quantized, found in zip(rows.numpy(), soft.numpy(), factor.flatten().tolist()):
        (expected,), *_ = np.linalg.lstsq(quantized[:, None], row, rcond=None)
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("change", [-1e-3, 1e-3, 0.5, -1.0])
def test_least_squares_scale_is_the_minimiser(rows, soft, change):
    factor = output_scale(rows, soft, normalizer(rows, "row"), "ls")

    def error(scale):
        return ((rows - scale * soft) ** 2).sum(dim=1)

    assert (error(factor * (1 + change)) > error(factor)).all()


def test_least_squares_scale_of_signs_is_the_mean_absolute_weight(rows):
    for normalize in NORMALIZATIONS:
        factor = output_scale(rows, sign(rows), normalizer(rows, normalize), "ls")
        np.testing.assert_allclose(factor.flatten().numpy(), np.abs(rows.numpy()).mean(axis=1), rtol=1e-13)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_fixed_scale_is_the_divisor(rows, soft, normalize):
    divisor = normalizer(rows, normalize)
    assert torch.equal(output_scale(rows, soft, divisor, "fixed"), divisor)


@pytest.mark.parametrize(("normalize", "scale"), [("rows", "ls"), ("row", "LS"), ("", "ls")])
def test_unknown_modes(normalize, scale):
    with pytest.raises(ConfigError, match="must be one of row, tensor, none|must be one of ls, fixed"):
        check_scaling(normalize, scale)
