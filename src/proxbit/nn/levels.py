"""Activations on levels by the compiled kernels: one pass over them, where operators take twenty."""

from collections.abc import Sequence

import torch
from torch import Tensor

from proxbit.kernels import CpuBackend, Levels, backend_for

__all__ = ["LevelPass", "level_pass"]


class LevelPass:
    """A pass of `blockwise.product` over a scale, a threshold and rows, `[1]`, `[I]` and `[n, I]`, or fewer of them.

    Args:
        backend: the kernels.
        levels: what they make of the rows.
    """

    def __init__(self, backend: CpuBackend, levels: Levels) -> None:
        # A clone: the schedule changes mu in place before the backward pass, where gradients are accumulated.
        mu = None if levels.mu is None else levels.mu.clone()
        self.backend, self.levels = backend, levels._replace(mu=mu)

    def results(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The values of the levels."""
        scale, threshold = _numbers(tensors)
        return (self.backend.level_values(self.levels, tensors[-1].detach(), scale, threshold),)

    def gradients(
        self, tensors: Sequence[Tensor], needs: Sequence[bool], grads: Sequence[Tensor | None], values: Tensor
    ) -> list[Tensor | None]:
        """Those of the tensors, by the one of the values, which is overwritten; `values` is given these once more."""
        grad, rows = grads[0], tensors[-1]
        assert grad is not None
        made = values if values.dtype is rows.dtype else torch.empty_like(rows)
        learned = self.backend.level_gradient(self.levels, rows, *_numbers(tensors), made, grad)
        if made is not values:
            values.copy_(made)
        return [*learned[: len(tensors) - 1], grad]


def level_pass(levels: Levels | None, numbers: Sequence[Tensor], rows: Tensor) -> LevelPass | None:
    """The pass, or None where torch's operators must do it."""
    if levels is None:
        return None
    backend = backend_for("level_values", *(each.detach() for each in (*numbers, rows)))
    return None if backend is None else LevelPass(backend, levels)


def _numbers(tensors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    numbers = [*tensors[:-1], None, None]
    return numbers[0], numbers[1]
