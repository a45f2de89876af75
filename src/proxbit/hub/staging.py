"""Folders that are written whole or not at all: made elsewhere, forced to disk, and renamed."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from proxbit.errors import CheckpointError

__all__ = ["put", "staged", "sync"]


def sync(folder: Path) -> None:
    """Have a folder and all that is in it written to disk: what a rename makes visible is then whole."""
    for each in folder.rglob("*"):
        _sync_one(each)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put(made: Path, folder: Path, aside: Path) -> None:
    """Rename `made` to `folder`, at once.

    Args:
        made: a folder that is complete, on the same file system.
        folder: what is there is replaced; it comes back if the place cannot be taken.
        aside: where it lies meanwhile. Nothing is there.
    """
    sync(made)
    if folder.exists():
        folder.rename(aside)
    try:
        made.rename(folder)
    except OSError:
        if aside.exists():
            aside.rename(folder)
        raise
    _sync_one(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when the block ends, and is gone if it fails.

    What an earlier block left because its process was killed is cleared away; a folder that it had moved aside comes
    back first.

    Args:
        folder: where to; parents are made, and what is there is replaced. Of a link, where it leads.

    Raises:
        CheckpointError: if this process works in the folder, which would be gone with the one that is replaced.
    """
    folder = folder.resolve()
    if Path.cwd().is_relative_to(folder):
        raise CheckpointError(f"{folder} is the folder that this is run in, which cannot be replaced. Name a new one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{escape(folder.name)}.old.*"):
        if not folder.exists():
            left.rename(folder)
    for part in ("new", "old"):
        for left in folder.parent.glob(f".{escape(folder.name)}.{part}.*"):
            shutil.rmtree(left, ignore_errors=True)
    made, old = (folder.with_name(f".{folder.name}.{part}.{uuid.uuid4().hex[:8]}") for part in ("new", "old"))
    made.mkdir()
    try:
        yield made
        put(made, folder, old)
    finally:
        shutil.rmtree(made, ignore_errors=True)
