"""A cache of one value that was computed from tensors, valid until one of them changes."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from proxbit.kernels import version_of

__all__ = ["TensorCache"]

T = TypeVar("T")
# A weak reference too: a new tensor may get the address of one that was freed.
Mark = tuple[weakref.ref[Tensor], int, int | None]


class TensorCache(Generic[T]):
    """A value computed from tensors; computed again when one was changed in place, was moved, or is another tensor."""

    def __init__(self) -> None:
        self._marks: list[Mark | None] | None = None
        self._value: T | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without a value."""
        return {"_marks": None, "_value": None}

    def __call__(self, tensors: Iterable[Tensor | None], make: Callable[[], T]) -> T:
        """The value that `make` returns for these tensors, without a gradient."""
        found = list(tensors)
        known = self._marks
        if known is None or len(known) != len(found) or not all(map(_is_same, known, found)):
            marks = [
                None if tensor is None else (weakref.ref(tensor), tensor.data_ptr(), version_of(tensor))
                for tensor in found
            ]
            # A tensor made in inference mode has no version: the kernels could not cache its layout.
            with torch.inference_mode(False), torch.no_grad():
                self._value, self._marks = make(), marks
        return cast(T, self._value)


def _is_same(mark: Mark | None, tensor: Tensor | None) -> bool:
    """Whether a tensor is the marked one, unchanged. False for tensors without a version counter."""
    if mark is None or tensor is None:
        return mark is None and tensor is None
    reference, address, version = mark
    same = reference() is tensor and tensor.data_ptr() == address
    return same and version is not None and version_of(tensor) == version
