"""The first examples of a stream, looked at before the training reads it: a stream may be read only once."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch.utils.data import IterableDataset

__all__ = ["Lookahead", "is_used_up"]


class Lookahead(IterableDataset[Any]):
    """A stream that gives back what was looked at: the next reading begins with it, and goes on where the look stopped.

    Args:
        stream: of examples. What it has beside them is asked of it: `set_epoch`, the number of its shards.
    """

    def __init__(self, stream: IterableDataset[Any]) -> None:
        self.stream = stream
        self.taken: list[Any] = []
        self.rest: Iterator[Any] | None = None

    def look(self) -> IterableDataset[Any]:
        """The examples for a look, which may stop anywhere; each look begins with the first."""
        return _Look(self)

    def __iter__(self) -> Iterator[Any]:
        taken, rest = self.taken, self.rest
        self.taken, self.rest = [], None
        return iter(self.stream) if rest is None else chain(taken, rest)

    def __len__(self) -> int:
        return len(self.stream)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # while a copy is made
            raise AttributeError(name)
        return getattr(self.stream, name)


class _Look(IterableDataset[Any]):
    def __init__(self, whole: Lookahead) -> None:
        self.whole = whole

    def __iter__(self) -> Iterator[Any]:
        whole = self.whole
        yield from list(whole.taken)
        if whole.rest is None:
            whole.rest = iter(whole.stream)
        for example in whole.rest:
            whole.taken.append(example)
            yield example


def is_used_up(dataset: IterableDataset[Any]) -> bool:
    """Whether a stream that has just been read to its end in this process gives nothing any more."""
    return next(iter(dataset), None) is None
