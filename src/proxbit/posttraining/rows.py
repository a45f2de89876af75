"""Latent weights that a layer packs to given signs, scales and offsets."""

import torch
from torch import Tensor

from proxbit.nn import LatentWeight
from proxbit.posttraining.closed_form import Rounding, Signs

__all__ = ["latents", "rounding_of"]

# Of the mean size of its row: a latent is at least so large, so that its sign survives every dtype.
FAINT = 1e-3


def rounding_of(layer: LatentWeight) -> Rounding:
    """How the row units of a layer let its rows be rounded."""
    units = layer.units
    if units.scales_differ:
        scale = "row"
    else:
        scale = "tensor" if units.normalize == "tensor" else "fixed"
    return Rounding(scale, offset=units.has_offset)


def latents(found: Signs, layer: LatentWeight) -> Tensor:
    """Latent weights with these signs, whose sizes say how sure each sign is, and which `pack` gives the scales.

    Args:
        found: the rows.
        layer: whose row units they are for.

    Returns:
        `[O, I]`, float64.
    """
    sizes = found.sources.abs()
    sizes = torch.maximum(sizes, FAINT * sizes.mean(dim=1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny))
    signs, units = found.signs, layer.units
    if units.center != "none":
        signs, sizes = _balanced(signs, sizes)
    rows = signs * sizes
    spread = rows.std(dim=1, correction=0) if units.scale == "fixed" and units.normalize == "std" else sizes.mean(dim=1)
    if units.scale == "fixed" and units.normalize == "none":
        spread = found.scale  # The scale is 1 whatever the latents are.
    return rows * (found.scale / spread)[:, None] + found.offset[:, None]


def _balanced(signs: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose mean is 0: the mean of a latent row is taken off before its sign."""
    for sign in (1, -1):  # A row of one sign only is no row about its mean: the least sure one becomes the other.
        alike = (signs == sign).all(dim=1)
        least = torch.zeros_like(signs, dtype=torch.bool).scatter_(1, sizes.argmin(dim=1, keepdim=True), True)
        signs = torch.where(alike[:, None] & least, -signs, signs)
    above = torch.where(signs > 0, sizes, 0)
    below = torch.where(signs < 0, sizes, 0)
    half = sizes.sum(dim=1, keepdim=True) / 2
    return signs, above * (half / above.sum(dim=1, keepdim=True)) + below * (half / below.sum(dim=1, keepdim=True))
