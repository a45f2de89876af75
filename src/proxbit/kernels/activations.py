"""Activations on levels in training, compiled: the values and the gradients of all that made them, in one pass."""

from typing import NamedTuple

import torch
from torch import Tensor

from proxbit.errors import PackedFormatError
from proxbit.kernels.interface import ACTIVATIONS_CALL, FUNCTIONS, KINDS, PART_ROWS
from proxbit.kernels.native import Native, address_of, mu_of, parallel_for, whole

__all__ = ["INT8", "Levels", "level_gradient", "level_values"]


class Levels(NamedTuple):
    """What activations become.

    Attributes:
        kind: one of `interface.KINDS`.
        forward: F of two levels, one of `interface.FUNCTIONS`; None for the levels themselves.
        backward: B of two levels, likewise.
        mu: sharpness of both, a 0-dimensional tensor.
        codes: the lowest and the highest of a grid.
    """

    kind: str
    forward: str | None = None
    backward: str = "one"
    mu: Tensor | None = None
    codes: tuple[int, int] = (0, 0)


INT8 = Levels("int8")


def level_values(level: Native, levels: Levels, x: Tensor, scale: Tensor | None, threshold: Tensor | None) -> Tensor:
    """Scale times code.

    Args:
        level: the kernels to use.
        levels: see there.
        x: `[..., I]`; one that `native.is_plain` is true for, as are the others.
        scale: `[1]`; None for int8.
        threshold: `[I]`; None but for two levels.

    Returns:
        Same shape.

    Raises:
        PackedFormatError: for a tensor without data, of another shape or of another dtype.
    """
    values = torch.empty_like(x)
    _call(level, levels, x, scale, threshold, values, None, None)
    return values


def level_gradient(
    level: Native,
    levels: Levels,
    x: Tensor,
    scale: Tensor | None,
    threshold: Tensor | None,
    values: Tensor,
    grad: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """The values once more, and gradients.

    Args:
        level: as above, and levels, x, scale and threshold too.
        values: becomes those; same shape as x.
        grad: of the values; becomes that of x in place.

    Returns:
        Those of the scale and of the threshold.

    Raises:
        PackedFormatError: for a tensor without data, of another shape or of another dtype.
    """
    if scale is None:
        _call(level, levels, x, None, None, values, None, None)  # straight through
        return None, None
    sums = x.new_empty(-(-len(x) // PART_ROWS), x.shape[1] + 1)
    _call(level, levels, x, scale, threshold, values, grad, sums)
    total = sums.sum(0)
    return total[-1:], None if threshold is None else -total[:-1]


def _call(
    level: Native,
    levels: Levels,
    x: Tensor,
    scale: Tensor | None,
    threshold: Tensor | None,
    values: Tensor,
    grad: Tensor | None,
    sums: Tensor | None,
) -> None:
    columns = x.shape[-1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "scale": (scale, (1,)),
        "threshold": (threshold, (columns,)),
        "values": (values, tuple(x.shape)),
        "gradient": (grad, tuple(x.shape)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and (
            tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous()
        ):
            raise PackedFormatError(
                f"The {name} of activations {list(x.shape)} must be {list(shape)} in fp32, contiguous; not "
                f"{list(tensor.shape)} in {tensor.dtype}."
            )
    if (levels.kind != "int8") != (scale is not None) or (levels.kind in KINDS[2:]) != (threshold is not None):
        raise PackedFormatError(f"int8 has no scale, and only two levels have a threshold: not so for {levels.kind!r}.")
    number = mu_of(x.new_zeros(()) if levels.mu is None else levels.mu)
    forward = -1 if levels.forward is None else FUNCTIONS.index(levels.forward)
    kind = KINDS.index(levels.kind), forward, FUNCTIONS.index(levels.backward), *levels.codes
    tensors = number, scale, threshold, x, values, grad, sums
    addresses = [address_of(each if each is None else whole(each)) for each in tensors]
    rows = x.numel() // columns
    call = ACTIVATIONS_CALL.pack(level.level, *kind, rows, columns, *addresses, parallel_for())
    level.library.proxbit_activations(call)
