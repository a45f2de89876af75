"""What is made of tensors, and kept until one of them changes."""

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from proxbit.kernels import version_of

__all__ = ["Kept"]

T = TypeVar("T")


class Kept(Generic[T]):
    """A value made of tensors, made anew when one of them was changed in place or lies elsewhere."""

    def __init__(self) -> None:
        self._states: list[tuple[int, int | None] | None] | None = None
        self._value: T | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without a value."""
        return {"_states": None, "_value": None}

    def __call__(self, tensors: Iterable[Tensor | None], make: Callable[[], T]) -> T:
        """The value that `make` gives for these tensors, without a gradient."""
        states = [None if tensor is None else (tensor.data_ptr(), version_of(tensor)) for tensor in tensors]
        # Of a tensor whose changes nobody counts nothing is kept.
        counted = all(state is None or state[1] is not None for state in states)
        if states != self._states or not counted:
            # What is made in inference mode would have no version: the kernels could not keep its layout.
            with torch.inference_mode(False), torch.no_grad():
                self._value, self._states = make(), states
        return cast(T, self._value)
