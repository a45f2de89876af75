"""Latents that pack to given signs, scales and offsets, in all row units and dtypes."""

import itertools

import pytest
import torch

from proxbit.nn import BinaryLinear
from proxbit.posttraining.closed_form import compensate
from proxbit.posttraining.rows import latents, rounding_of
from proxbit.quantizers import get_pair
from proxbit.quantizers.row_units import CENTERINGS, NORMALIZATIONS, SCALES

UNITS = itertools.product(NORMALIZATIONS, SCALES, CENTERINGS)
DTYPES = itertools.cycle([torch.float64, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16])


@pytest.mark.parametrize(
    ("normalize", "scale", "center", "dtype"), [(*u, d) for u, d in zip(UNITS, DTYPES, strict=False)]
)
def test_pack_gives_what_was_found(normalize, scale, center, dtype):
    torch.manual_seed(1)
    units = {"normalize": normalize, "scale": scale, "center": center}
    layer = BinaryLinear(24, 9, pair=get_pair("bc"), dtype=dtype, **units)
    x = torch.randn(200, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    weight = torch.randn(9, 24, dtype=torch.float64)
    _, start, _ = layer.hard_rows()
    found = compensate(weight, x.T @ x / len(x), rounding_of(layer), start.double())
    with torch.no_grad():
        layer.weight.copy_(latents(found, layer))
    values, scales, offset = layer.hard_rows()
    assert torch.equal(torch.where(values >= 0, 1.0, -1.0).double(), found.signs)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(scales.double(), found.scale, rtol=tolerance, atol=0)
    if offset is not None:
        torch.testing.assert_close(offset.double(), found.offset, rtol=0, atol=tolerance)
    layer.check_latent("layer")


def test_sure_signs_are_large():
    layer = BinaryLinear(40, 3, pair=get_pair("bc"), dtype=torch.float64)
    x = torch.randn(100, 40, dtype=torch.float64)
    found = compensate(
        torch.randn(3, 40, dtype=torch.float64), x.T @ x / 100, rounding_of(layer), torch.ones(3).double()
    )
    made = latents(found, layer)
    order = torch.corrcoef(torch.stack([made.abs()[0], found.sources.abs()[0]]))[0, 1]
    assert order > 0.999


@pytest.mark.parametrize("center", ["remove", "restore"])
def test_a_row_of_one_sign_gets_another(center):
    """About its own mean a row has both."""
    layer = BinaryLinear(6, 2, pair=get_pair("bc"), center=center)
    weight = torch.rand(2, 6, dtype=torch.float64) + 1
    found = compensate(weight, torch.eye(6, dtype=torch.float64), rounding_of(layer), weight.mean(1))
    assert center == "restore" or bool((found.signs > 0).all())
    with torch.no_grad():
        layer.weight.copy_(latents(found, layer))
    values, _, _ = layer.hard_rows()
    assert all(len(set(row.sign().tolist())) == 2 for row in values)
    layer.check_latent("layer")
