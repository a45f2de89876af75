"""Row normalisation and row scales."""

import itertools

import numpy as np
import pytest
import torch

from proxbit.errors import ConfigError, LatentError
from proxbit.quantizers import hard_rows
from proxbit.quantizers.row_units import CENTERINGS, NORMALIZATIONS, SCALES, RowUnits, check_rows
from proxbit.sign import sign


@pytest.fixture
def rows():
    """Rows whose sizes differ by powers of ten."""
    return torch.randn(6, 11, dtype=torch.float64) * 10.0 ** torch.arange(-3, 3, dtype=torch.float64).unsqueeze(1)


@pytest.fixture
def soft(rows):
    return torch.tanh(rows / rows.abs().mean(dim=1, keepdim=True))


def test_divisors_by_hand():
    """`tensor` is that of each row here: its mean over all rows is taken where all rows are known."""
    rows = torch.tensor([[1.0, -3.0], [0.5, 0.0]])
    assert (
        RowUnits(normalize="row").divisor(rows).tolist()
        == RowUnits(normalize="tensor").divisor(rows).tolist()
        == [[2.0], [0.25]]
    )
    assert RowUnits(normalize="std").divisor(rows).tolist() == [[2.0], [0.25]]
    assert RowUnits(normalize="none").divisor(rows).tolist() == [[1.0], [1.0]]


def test_offsets_by_hand():
    rows = torch.tensor([[1.0, -3.0], [0.5, 0.0]])
    assert RowUnits(center="none").offset(rows).tolist() == [[0.0], [0.0]]
    assert (
        RowUnits(center="remove").offset(rows).tolist()
        == RowUnits(center="restore").offset(rows).tolist()
        == [[-1.0], [0.25]]
    )


def test_std_is_that_of_the_population(rows):
    np.testing.assert_allclose(
        RowUnits(normalize="std").divisor(rows)[:, 0].numpy(), np.std(rows.numpy(), axis=1), rtol=1e-13
    )


def test_row_normalisation_gives_rows_of_size_one(rows):
    units = rows / RowUnits(normalize="row").divisor(rows)
    np.testing.assert_allclose(units.abs().mean(dim=1).numpy(), np.ones(6), rtol=1e-14)


def test_standardised_rows(rows):
    """IR-Net: mean 0 and deviation 1, once the offset is taken off."""
    centred = rows - RowUnits(center="remove").offset(rows)
    units = (centred / RowUnits(normalize="std").divisor(centred)).numpy()
    np.testing.assert_allclose(units.mean(axis=1), np.zeros(6), atol=1e-14)
    np.testing.assert_allclose((units**2).mean(axis=1), np.ones(6), rtol=1e-13)


@pytest.mark.parametrize(
    ("factor", "normalize", "center"),
    [(2.0**-40, "row", "none"), (0.125, "std", "remove"), (1024.0, "row", "restore"), (1024.0, "std", "none")],
)
def test_row_scaling_changes_nothing_in_units(rows, factor, normalize, center):
    """Powers of two, so that the equality is exact."""
    factors = torch.tensor([factor, 1, factor, 1, factor, factor], dtype=torch.float64).unsqueeze(1)
    scaled = rows * factors
    centred, scaled = rows - RowUnits(center=center).offset(rows), scaled - RowUnits(center=center).offset(scaled)
    assert torch.equal(
        scaled / RowUnits(normalize=normalize).divisor(scaled), centred / RowUnits(normalize=normalize).divisor(centred)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("normalize", "scale"), list(zip(NORMALIZATIONS, SCALES * 2)))
def test_zero_rows_stay_finite_and_dtype_is_kept(normalize, scale, dtype):
    rows = torch.zeros(3, 5, dtype=dtype)
    divisor = RowUnits(normalize=normalize).divisor(rows)
    assert divisor.shape == (3, 1)
    assert divisor.dtype == dtype
    units = rows / divisor
    assert torch.isfinite(units).all()
    for quantized in (units, sign(units)):
        factor = RowUnits(scale=scale).factor(rows, quantized, divisor)
        assert factor.shape == (3, 1)
        assert torch.isfinite(factor).all()
        assert not (quantized * factor / 2).isnan().any()


def test_least_squares_scale_is_the_regression_of_the_row(rows, soft):
    factor = RowUnits(scale="ls").factor(rows, soft, RowUnits(normalize="row").divisor(rows))
    for row, quantized, found in zip(rows.numpy(), soft.numpy(), factor.flatten().tolist()):
        (expected,), *_ = np.linalg.lstsq(quantized[:, None], row, rcond=None)
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("change", [-1e-3, 1e-3, 0.5, -1.0])
def test_least_squares_scale_is_the_minimiser(rows, soft, change):
    factor = RowUnits(scale="ls").factor(rows, soft, RowUnits(normalize="row").divisor(rows))

    def error(scale):
        return ((rows - scale * soft) ** 2).sum(dim=1)

    assert (error(factor * (1 + change)) > error(factor)).all()


def test_least_squares_scale_of_signs_is_the_mean_absolute_weight(rows):
    for normalize in NORMALIZATIONS:
        factor = RowUnits(scale="ls").factor(rows, sign(rows), RowUnits(normalize=normalize).divisor(rows))
        np.testing.assert_allclose(factor.flatten().numpy(), np.abs(rows.numpy()).mean(axis=1), rtol=1e-13)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_fixed_scale_is_the_divisor(rows, soft, normalize):
    divisor = RowUnits(normalize=normalize).divisor(rows)
    assert torch.equal(RowUnits(scale="fixed").factor(rows, soft, divisor), divisor)


@pytest.mark.parametrize("center", CENTERINGS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_constant_rows_stay_finite(normalize, center):
    """A row of one value deviates by zero."""
    rows = torch.tensor([[0.5, 0.5, 0.5], [-40.0, -40.0, -40.0]])
    centred = rows - RowUnits(center=center).offset(rows)
    assert torch.isfinite(centred / RowUnits(normalize=normalize).divisor(centred)).all()


def test_what_a_packed_row_stores(rows):
    """A scale of its own, and an offset, or not: as it is told of the units, so the stored rows are."""
    for normalize, scale, center in itertools.product(NORMALIZATIONS, SCALES, CENTERINGS):
        units = RowUnits(normalize, scale, center)
        stored = hard_rows(rows, units)
        assert units.scales_differ == (len(stored.scale.unique()) > 1)
        assert units.has_offset == (stored.offset is not None)


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        (("rows", "ls"), "normalize must be one of row, tensor, std, none; not 'rows'"),
        (("", "ls"), "normalize must be one of row, tensor, std, none; not ''"),
        (("row", "LS"), "scale must be one of ls, fixed; not 'LS'"),
        (("row", "ls", "mean"), "center must be one of none, remove, restore; not 'mean'"),
    ],
    ids=["normalize", "empty", "scale", "center"],
)
def test_unknown_modes(modes, message):
    with pytest.raises(ConfigError, match=message):
        RowUnits(*modes)


@pytest.mark.parametrize(
    ("value", "words"),
    [(float("nan"), "W: 1 of 6 rows hold NaN or infinite values"), (0.0, "Such rows have no signs: leave it or")],
    ids=["nan", "zero"],
)
def test_rows_that_have_no_signs(rows, value, words):
    check_rows(rows, "none", "W", "it")
    rows[3] = value
    with pytest.raises(LatentError, match=words):
        check_rows(rows, "none", "W", "it")


def test_equal_rows_have_signs_unless_their_mean_is_taken_off(rows):
    rows[2] = 0.1
    for center in CENTERINGS:
        if center == "remove":
            with pytest.raises(LatentError, match="W: the weights of row 2 are all equal"):
                check_rows(rows, center, "W", "it")
        else:
            check_rows(rows, center, "W", "it")


@pytest.mark.parametrize("columns", [3, 192, 384, 768, 3072])
def test_equal_weights_are_found_whatever_the_rounding_of_their_mean(columns):
    generator = torch.Generator().manual_seed(columns)
    for value in torch.rand(50, generator=generator) / 10:
        with pytest.raises(LatentError, match="row 1 are all equal"):
            check_rows(torch.stack([torch.randn(columns), value.expand(columns)]), "remove", "w", "it out")
