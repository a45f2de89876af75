"""What autograd keeps for the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Kept(dict[int, int]):
    """Bytes by storage, each once however many tensors share it."""

    def total(self, without: nn.Module | None = None) -> int:
        """Bytes of all, but for the parameters of a module."""
        own = {parameter.untyped_storage()._cdata for parameter in without.parameters()} if without else ()
        return sum(size for storage, size in self.items() if storage not in own)


@contextmanager
def kept_for_backward() -> Iterator[Kept]:
    """Counts what is kept within the context. While results live, no storage is used twice: hold on to them."""
    kept = Kept()

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept
