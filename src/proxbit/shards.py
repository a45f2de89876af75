"""Weights that are spread over processes: a row is worked on where it is, and only what was made of it moves."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

__all__ = ["gathered", "on_rows", "placed_like", "sum_of_rows", "whole_rows"]

Made = TypeVar("Made", Tensor, tuple[Tensor | None, ...])


def gathered(value: Tensor) -> Tensor:
    """The whole of a tensor, in every process."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_rows(value: Tensor) -> Tensor:
    """The same tensor, with whole rows in each process.

    What is spread by rows stays where it is. Columns that are spread change places, all to all: no process ever holds
    more than its share.
    """
    return _whole_rows(value) if isinstance(value, DTensor) else value


def _whole_rows(value: DTensor) -> DTensor:
    return value.redistribute(placements=[each if each.is_replicate() else Shard(0) for each in value.placements])


def placed_like(value: Tensor, other: Tensor) -> Tensor:
    """The same tensor, spread as another one of its shape is."""
    if isinstance(value, DTensor) and isinstance(other, DTensor):
        return value.redistribute(placements=other.placements)
    return value


def on_rows(function: Callable[[Tensor], Made], value: Tensor) -> Made:
    """Apply a function that treats each row by itself; each process applies it to its rows. Gradients flow through it.

    Args:
        function: `[R, ...]` to `[R, ...]`, or to a tuple of such tensors and None; for any R, 0 too.
        value: `[O, ...]`, whole, or spread over processes (a DTensor).

    Returns:
        `[O, ...]`, or a tuple of such; spread by rows if `value` is spread.
    """
    if not isinstance(value, DTensor):
        return function(value)
    rows = _whole_rows(value)
    result = function(rows.to_local())
    if isinstance(result, Tensor):
        return _spread(result, rows)
    return tuple(None if part is None else _spread(part, rows) for part in result)


def _spread(part: Tensor, rows: DTensor) -> DTensor:
    """What was made of the rows of this process, as its part of the whole."""
    shape = torch.Size([rows.shape[0], *part.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, rows.device_mesh, rows.placements, run_check=False, shape=shape, stride=stride)


def sum_of_rows(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """The sum over processes of what a function makes of the rows of each.

    Args:
        function: `[R, ...]` to a tensor whose shape does not depend on R, such as a count.
        value: `[O, ...]`, whole, or spread over processes.

    Returns:
        Whole, in every process.
    """
    if not isinstance(value, DTensor):
        return function(value)
    rows = _whole_rows(value)
    parts = [Replicate() if each.is_replicate() else Partial() for each in rows.placements]
    return DTensor.from_local(function(rows.to_local()), rows.device_mesh, parts, run_check=False).full_tensor()
