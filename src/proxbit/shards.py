"""Sharded weights (DTensors): each process works on its own rows, and only what it made of them is sent."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

__all__ = ["gathered", "is_sharded", "on_rows", "placed_like", "sum_of_rows", "whole_rows"]

Made = TypeVar("Made", Tensor, tuple[Tensor | None, ...])


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor is a DTensor, whatever its placements."""
    return isinstance(value, DTensor)


def gathered(value: Tensor) -> Tensor:
    """The full tensor, in every process."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_rows(value: Tensor) -> Tensor:
    """The same tensor, with whole rows in each process.

    A tensor that is sharded by rows stays as it is. One that is sharded by columns is redistributed, all to all: no
    process ever holds more than its share.
    """
    return _whole_rows(value) if isinstance(value, DTensor) else value


def _whole_rows(value: DTensor) -> DTensor:
    return value.redistribute(placements=[each if each.is_replicate() else Shard(0) for each in value.placements])


def placed_like(value: Tensor, other: Tensor) -> Tensor:
    """The same tensor, with the placements of another one of its shape."""
    if isinstance(value, DTensor) and isinstance(other, DTensor):
        return value.redistribute(placements=other.placements)
    return value


def on_rows(function: Callable[[Tensor], Made], value: Tensor) -> Made:
    """Apply a function that treats each row by itself; each process applies it to its rows. Gradients flow through it.

    Args:
        function: `[R, ...]` to `[R, ...]`, or to a tuple of such tensors and None; for any R, 0 too.
        value: `[O, ...]`, full, or sharded (a DTensor).

    Returns:
        `[O, ...]`, or a tuple of such; sharded by rows if `value` is sharded.
    """
    if not isinstance(value, DTensor):
        return function(value)
    rows = _whole_rows(value)
    result = function(rows.to_local())
    if isinstance(result, Tensor):
        return _sharded(result, rows)
    return tuple(None if part is None else _sharded(part, rows) for part in result)


def _sharded(part: Tensor, rows: DTensor) -> DTensor:
    """What was made of the rows of this process, as its shard of the full tensor."""
    shape = torch.Size([rows.shape[0], *part.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, rows.device_mesh, rows.placements, run_check=False, shape=shape, stride=stride)


def sum_of_rows(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """The sum over processes of what a function makes of the rows of each.

    Args:
        function: `[R, ...]` to a tensor whose shape does not depend on R, such as a count.
        value: `[O, ...]`, full, or sharded.

    Returns:
        The full sum, in every process.
    """
    if not isinstance(value, DTensor):
        return function(value)
    rows = _whole_rows(value)
    parts = [Replicate() if each.is_replicate() else Partial() for each in rows.placements]
    return DTensor.from_local(function(rows.to_local()), rows.device_mesh, parts, run_check=False).full_tensor()
