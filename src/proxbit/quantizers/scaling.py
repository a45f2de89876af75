"""Row units: F is a map between numbers of order 1, whatever the layer.

A weight `W` of shape `[rows, ...]` has one row per output channel. All functions here work on `[rows, columns]`. With
an offset c, a divisor s and a scale a for each row, the weight of the forward pass is

    w = a F((W - c) / s)  (+ c, if the offset is restored)

Each of the three is chosen by itself, and goes with any quantizer pair.
"""

import torch
from torch import Tensor

from proxbit.errors import ConfigError, LatentError
from proxbit.shards import gathered, on_rows

__all__ = [
    "CENTERINGS",
    "NORMALIZATIONS",
    "SCALES",
    "check_rows",
    "check_scaling",
    "output_scale",
    "row_divisor",
    "row_offset",
]

CENTERINGS = ("none", "remove", "restore")
NORMALIZATIONS = ("row", "tensor", "std", "none")
SCALES = ("ls", "fixed")


def check_scaling(normalize: str, scale: str, center: str = "none") -> None:
    """Raise ConfigError unless all are valid; the message lists what is."""
    checks = (("normalize", normalize, NORMALIZATIONS), ("scale", scale, SCALES), ("center", center, CENTERINGS))
    for name, value, valid in checks:
        if value not in valid:
            raise ConfigError(f"{name} must be one of {', '.join(valid)}; not {value!r}.")


def check_rows(weight: Tensor, center: str, name: str, leave_out: str) -> None:
    """Check that every row of a latent weight can be binarized.

    Args:
        weight: `[rows, ...]`, floating point.
        center: one of `CENTERINGS`.
        name: what the messages call the weight.
        leave_out: how to do without it, as the end of "leave ...".

    Raises:
        LatentError: for NaN, infinite values, or a row that is all zero, also once its mean is taken off for good.
    """
    rows = weight.detach().flatten(1)
    finite = gathered(on_rows(lambda rows: torch.isfinite(rows).all(dim=1), rows))
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten()
        raise LatentError(
            f"{name}: {len(bad)} of {len(rows)} rows hold NaN or infinite values (first: row {int(bad[0])})."
        )
    empty = gathered(on_rows(lambda rows: (rows == 0).all(dim=1), rows))
    if bool(empty.any()):
        bad = empty.nonzero().flatten()
        raise LatentError(
            f"{name}: {len(bad)} of {len(rows)} rows are all zero (first: row {int(bad[0])}). "
            f"Such rows have no signs: leave {leave_out} or initialise it."
        )
    constant = gathered(on_rows(_all_equal, rows))
    if center == "remove" and bool(constant.any()):
        row = int(constant.nonzero()[0, 0])
        raise LatentError(
            f"{name}: the weights of row {row} are all equal: nothing is left of it with center='remove'. "
            "Use center='restore' or 'none'."
        )


def _all_equal(rows: Tensor) -> Tensor:
    """Whether the weights of a row are, up to rounding, one number."""
    return rows.amax(dim=1) - rows.amin(dim=1) <= torch.finfo(rows.dtype).eps * rows.abs().amax(dim=1)


def row_offset(rows: Tensor, center: str) -> Tensor:
    r"""The offset c that is taken off a row before F.

    Formula:
        none       c_i = 0
        remove     c_i = mean_j W_ij
        restore    c_i = mean_j W_ij, which is added again after F: the levels are c - a and c + a

    Args:
        rows: `[rows, columns]`, floating point.
        center: one of `CENTERINGS`.

    Returns:
        `[rows, 1]`.

    Source:
        remove: IR-Net (Qin et al., CVPR 2020), and the published code of XNOR-Net (Rastegari et al., ECCV 2016);
        restore: AdaBin (Tu, Chen, Ren, Wang, ECCV 2022), equation of the binary set.
    """
    return rows.new_zeros(()).expand(rows.shape[0], 1) if center == "none" else rows.mean(dim=1, keepdim=True)


def row_divisor(rows: Tensor, normalize: str) -> Tensor:
    r"""The divisor s that takes latent weights, centred already, to numbers of order 1.

    Formula:
        row     s_i = mean_j |W_ij|
        tensor  the same; its mean over all rows is taken by `quantize`, which meets the rows in blocks
        std     s_i = sqrt(mean_j (W_ij - mean_j W_ij)^2)
        none    s_i = 1

    Args:
        rows: `[rows, columns]`, floating point.
        normalize: one of `NORMALIZATIONS`.

    Returns:
        `[rows, 1]`, at least the smallest normal number, so that a division by it is finite.

    Source:
        row: XNOR-Net (Rastegari, Ordonez, Redmon, Farhadi, ECCV 2016), where it is the least-squares scale of
        the signs; tensor: DoReFa-Net (Zhou et al., 2016); std: IR-Net (Qin et al., CVPR 2020).
    """
    if normalize == "none":
        return rows.new_ones(()).expand(rows.shape[0], 1)
    if normalize == "std":
        # The rounding of equal numbers must not become a unit.
        rounding = torch.finfo(rows.dtype).eps * rows.abs().amax(dim=1, keepdim=True)
        size = torch.maximum(rows.std(dim=1, keepdim=True, correction=0), rounding)
    else:
        size = rows.abs().mean(dim=1, keepdim=True)
    return size.clamp(min=torch.finfo(rows.dtype).tiny)


def output_scale(rows: Tensor, quantized: Tensor, divisor: Tensor, scale: str) -> Tensor:
    r"""The factor a that brings F(W / s) back to the size of W.

    Formula:
        ls      a_i = <q_i, W_i> / <q_i, q_i>, the minimiser of ||W_i - a_i q_i||; mean |W_i| for signs
        fixed   a_i = s_i

    Args:
        rows: the latent weight W, centred already, `[rows, columns]`.
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
