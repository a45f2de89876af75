"""Row units: F is a map between numbers of order 1, whatever the layer.

A weight `W` of shape `[rows, ...]` has one row per output channel. All functions here work on `[rows, columns]`. With
an offset c, a divisor s and a scale a for each row, the weight of the forward pass is

    w = a F((W - c) / s)  (+ c, if the offset is restored)

The three are independent of each other and of the quantizer pair.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from proxbit.errors import ConfigError, LatentError
from proxbit.shards import gathered, on_rows

__all__ = ["CENTERINGS", "NORMALIZATIONS", "SCALES", "RowUnits", "check_rows"]

CENTERINGS = ("none", "remove", "restore")
NORMALIZATIONS = ("row", "tensor", "std", "none")
SCALES = ("ls", "fixed")


@dataclass(frozen=True)
class RowUnits:
    r"""How the rows of a latent weight are brought to numbers of order 1, and back.

    Args:
        normalize: how s is found, one of `NORMALIZATIONS`, see `divisor`.
        scale: how a is found, one of `SCALES`, see `factor`.
        center: how c is found, one of `CENTERINGS`, see `offset`.

    Raises:
        ConfigError: for any other value; the message lists the valid ones.
    """

    normalize: str = "row"
    scale: str = "ls"
    center: str = "none"

    def __post_init__(self) -> None:
        for name, valid in (("normalize", NORMALIZATIONS), ("scale", SCALES), ("center", CENTERINGS)):
            value = getattr(self, name)
            if value not in valid:
                raise ConfigError(f"{name} must be one of {', '.join(valid)}; not {value!r}.")

    def override(self, **given: str | None) -> "RowUnits":
        """The same units, but for the fields that are given and not None."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    @property
    def has_offset(self) -> bool:
        """Whether a packed row stores its offset beside its scale."""
        return self.center == "restore"

    @property
    def scales_differ(self) -> bool:
        """Whether each row has a scale of its own."""
        return self.scale == "ls" or self.normalize in ("row", "std")

    def offset(self, rows: Tensor) -> Tensor:
        r"""The offset c that is taken off a row before F.

        Formula:
            none       c_i = 0
            remove     c_i = mean_j W_ij
            restore    c_i = mean_j W_ij, which is added again after F: the levels are c - a and c + a

        Args:
            rows: W, `[rows, columns]`, floating point.

        Returns:
            `[rows, 1]`.

        Source:
            remove: IR-Net (Qin et al., CVPR 2020), and the published code of XNOR-Net (Rastegari et al., ECCV 2016);
            restore: AdaBin (Tu, Chen, Ren, Wang, ECCV 2022), equation of the binary set.
        """
        if self.center == "none":
            return rows.new_zeros(()).expand(rows.shape[0], 1)
        return rows.mean(dim=1, keepdim=True)

    def divisor(self, rows: Tensor) -> Tensor:
        r"""The divisor s that takes latent weights, centred already, to numbers of order 1.

        Formula:
            row     s_i = mean_j |W_ij|
            tensor  the same; its mean over all rows is taken by `quantize`, which meets the rows in blocks
            std     s_i = sqrt(mean_j (W_ij - mean_j W_ij)^2)
            none    s_i = 1

        Args:
            rows: `[rows, columns]`, floating point.

        Returns:
            `[rows, 1]`, at least the smallest normal number, so that a division by it is finite.

        Source:
            row: XNOR-Net (Rastegari, Ordonez, Redmon, Farhadi, ECCV 2016), where it is the least-squares scale of
            the signs; tensor: DoReFa-Net (Zhou et al., 2016); std: IR-Net (Qin et al., CVPR 2020).
        """
        if self.normalize == "none":
            return rows.new_ones(()).expand(rows.shape[0], 1)
        if self.normalize == "std":
            # The rounding of equal numbers must not become a unit.
            rounding = torch.finfo(rows.dtype).eps * rows.abs().amax(dim=1, keepdim=True)
            size = torch.maximum(rows.std(dim=1, keepdim=True, correction=0), rounding)
        else:
            size = rows.abs().mean(dim=1, keepdim=True)
        return size.clamp(min=torch.finfo(rows.dtype).tiny)

    def factor(self, rows: Tensor, quantized: Tensor, divisor: Tensor) -> Tensor:
        r"""The factor a that brings F(W / s) back to the size of W.

        Formula:
            ls      a_i = <q_i, W_i> / <q_i, q_i>, the minimiser of ||W_i - a_i q_i||; mean |W_i| for signs
            fixed   a_i = s_i

        Args:
            rows: W, centred already, `[rows, columns]`.
            quantized: q = F(W / s), same shape.
            divisor: s, `[rows, 1]`.

        Returns:
            `[rows, 1]`.
        """
        if self.scale == "fixed":
            return divisor
        energy = (quantized * quantized).sum(dim=1, keepdim=True)
        return (quantized * rows).sum(dim=1, keepdim=True) / energy.clamp(min=torch.finfo(rows.dtype).tiny)


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
