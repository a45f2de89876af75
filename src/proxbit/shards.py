"""Weights that are spread over processes: a row is worked on where it is, and only what was made of it moves."""

from collections.abc import Callable

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

__all__ = ["gathered", "is_spread", "on_rows", "sum_of_rows"]


def is_spread(value: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return isinstance(value, DTensor)


def gathered(value: Tensor) -> Tensor:
    """The whole of a tensor, in every process."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _whole_rows(value: DTensor) -> DTensor:
    """The same tensor with whole rows in each process. It moves only where columns were spread, and is never gathered."""
    placements = [each if each.is_replicate() else Shard(0) for each in value.placements]
    return value.redistribute(placements=placements)


def on_rows(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Apply a function that treats each row by itself; a process applies it to the rows it has.

    Args:
        function: `[R, ...]` to `[R, ...]`, for any R, 0 too.
        rows: `[O, ...]`, whole, or spread over processes (a DTensor).

    Returns:
        `[O, ...]`; spread over processes by rows if `rows` is spread.
    """
    if not isinstance(rows, DTensor):
        return function(rows)
    rows = _whole_rows(rows)
    result = function(rows.to_local())
    shape = rows.shape[:1] + result.shape[1:]
    stride = result.new_empty(shape, device="meta").stride()
    return DTensor.from_local(result, rows.device_mesh, rows.placements, run_check=False, shape=shape, stride=stride)


def sum_of_rows(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """The sum of what a function makes of the rows of each process.

    Args:
        function: `[R, ...]` to a tensor whose shape does not depend on R, such as a count.
        rows: `[O, ...]`, whole, or spread over processes.

    Returns:
        Whole, in every process.
    """
    if not isinstance(rows, DTensor):
        return function(rows)
    rows = _whole_rows(rows)
    parts = [Replicate() if each.is_replicate() else Partial() for each in rows.placements]
    return DTensor.from_local(function(rows.to_local()), rows.device_mesh, parts, run_check=False).full_tensor()
