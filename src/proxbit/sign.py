"""The one sign of the project: it is never zero, in training, packing and kernels alike."""

from torch import Tensor

__all__ = ["is_positive", "reaches", "sign"]


def is_positive(values: Tensor) -> Tensor:
    r"""Whether a value binarizes to +1.

    Formula:
        p(x) = 1[x \ge 0],   so 0.0 and -0.0 are positive.

    Args:
        values: any shape, floating point. NaN counts as negative; latents are checked where they enter and leave.

    Returns:
        Same shape, `bool`.
    """
    return values >= 0


def reaches(values: Tensor, boundary: Tensor | float) -> Tensor:
    r"""The indicator of values that are not below a boundary, as numbers.

    Formula:
        1[x \ge b]

    Args:
        values: x, any shape, floating point; NaN is below everything.
        boundary: b, a number, or a tensor that broadcasts to the shape of x and has its dtype.

    Returns:
        0.0 and 1.0, same shape, dtype and device as x.
    """
    # Written as floats: on a CPU, a comparison that makes booleans, and their conversion, take five times as long each.
    return values.detach().clone().ge_(boundary)


def sign(values: Tensor, boundary: Tensor | float = 0.0) -> Tensor:
    r"""Sign with values in {-1, +1}.

    Formula:
        sign(x) = +1 if x \ge 0 else -1.   Unlike `torch.sign`, sign(0) = +1.

    Args:
        values: any shape, floating point.
        boundary: where +1 begins, as in `reaches`.

    Returns:
        Same shape, dtype and device.

    Examples:
        >>> import torch
        >>> sign(torch.tensor([-2.0, -0.0, 0.0, 3.0]))
        tensor([-1.,  1.,  1.,  1.])
    """
    return reaches(values, boundary).mul_(2).sub_(1)
