"""Public names that were renamed: they keep working, and warn."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["renamed"]


def renamed(module: str, names: Mapping[str, tuple[str, Any]]) -> Callable[[str], Any]:
    """A `__getattr__` for a module: old names of what is now called otherwise.

    Args:
        module: the name of the module.
        names: for each old name, the new one, with its module where that is another one, and what it stands for.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new, value = names[name]
        now = new if "." in new else f"{module}.{new}"
        warnings.warn(f"{module}.{name} is now {now}", DeprecationWarning, stacklevel=2)
        return value

    return find
