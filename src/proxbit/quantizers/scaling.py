"""Row normalisation and row scales: F is a map between numbers of order 1, whatever the layer.

A weight `W` of shape `[rows, ...]` has one row per output channel. All functions here work on `[rows, columns]`.
"""

import torch
from torch import Tensor

from proxbit.errors import ConfigError

__all__ = ["NORMALIZATIONS", "SCALES", "check_scaling", "normalizer", "output_scale"]

NORMALIZATIONS = ("row", "tensor", "none")
SCALES = ("ls", "fixed")


def check_scaling(normalize: str, scale: str) -> None:
    """Raise ConfigError unless both are valid; the message lists what is."""
    for name, value, valid in (("normalize", normalize, NORMALIZATIONS), ("scale", scale, SCALES)):
        if value not in valid:
            raise ConfigError(f"{name} must be one of {', '.join(valid)}; not {value!r}.")


def normalizer(rows: Tensor, normalize: str) -> Tensor:
    r"""The divisor s that takes latent weights to numbers of order 1.

    Formula:
        row     s_i = mean_j |W_ij|
        tensor  s_i = mean_ij |W_ij|
        none    s_i = 1

    Args:
        rows: `[rows, columns]`, floating point.
        normalize: one of `NORMALIZATIONS`.

    Returns:
        `[rows, 1]`, at least the smallest normal number, so that a division by it is finite.

    Source:
        XNOR-Net: Rastegari, Ordonez, Redmon, Farhadi, ECCV 2016 (s is the least-squares scale of the signs).
    """
    if normalize == "none":
        return rows.new_ones(()).expand(rows.shape[0], 1)
    mean = rows.abs().mean(dim=1, keepdim=True)
    if normalize == "tensor":
        mean = mean.mean(dim=0, keepdim=True).expand(rows.shape[0], 1)
    return mean.clamp(min=torch.finfo(rows.dtype).tiny)


def output_scale(rows: Tensor, quantized: Tensor, divisor: Tensor, scale: str) -> Tensor:
    r"""The factor a that brings F(W / s) back to the size of W.

    Formula:
        ls      a_i = <q_i, W_i> / <q_i, q_i>, the minimiser of ||W_i - a_i q_i||; mean |W_i| for signs
        fixed   a_i = s_i

    Args:
        rows: the latent weight W, `[rows, columns]`.
        quantized: q = F(W / s), same shape.
        divisor: s, `[rows, 1]`.
        scale: one of `SCALES`.

    Returns:
        `[rows, 1]`.
    """
    if scale == "fixed":
        return divisor
    energy = (quantized * quantized).sum(dim=1, keepdim=True)
    return (quantized * rows).sum(dim=1, keepdim=True) / energy.clamp(min=torch.finfo(rows.dtype).tiny)
