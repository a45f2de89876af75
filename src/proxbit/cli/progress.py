"""Progress bars: on standard error, gone when they are full, and only where somebody looks."""

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

__all__ = ["watch"]

Item = TypeVar("Item")


def watch(title: str, items: Iterable[Item], total: int) -> Iterable[Item]:
    """Hand the items on, with a bar of how many of them are done."""
    console = Console(stderr=True)
    return track(items, title, total=total, console=console, transient=True, disable=not console.is_terminal)
