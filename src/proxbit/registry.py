"""A mapping from names to objects that refuses duplicates and explains unknown names."""

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

from proxbit.errors import UnknownNameError

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Named objects of one kind.

    Args:
        kind: what the entries are, in the singular, for error messages ("quantizer pair").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add `entry` under `name` and return it.

        Raises:
            UnknownNameError: if the name is empty or already taken.
        """
        if not name:
            raise UnknownNameError(f"A {self.kind} needs a name that is not empty.")
        if name in self._entries:
            raise UnknownNameError(f"The {self.kind} {name!r} is already registered; choose another name.")
        self._entries[name] = entry
        return entry

    def get(self, name: str) -> T:
        """The entry called `name`.

        Raises:
            UnknownNameError: if there is none; the message lists the valid names and the nearest ones.
        """
        if name in self._entries:
            return self._entries[name]
        near = difflib.get_close_matches(str(name), self._entries, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UnknownNameError(f"Unknown {self.kind} {name!r}.{hint} Valid: {', '.join(sorted(self._entries))}.")

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
