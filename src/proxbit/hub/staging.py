"""Folders that are written whole or not at all: made elsewhere, forced to disk, and renamed."""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from proxbit.errors import CheckpointError
from proxbit.hub.lock import locked

__all__ = ["put", "staged", "sync"]

# Seconds that a writer waits for another one of the same folder.
WAIT = 60
# In a folder that `staged` writes into: with its name it tells that proxbit made it.
_MARK = "proxbit_staging"
_NEW, _OLD = "new", "old"


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

    One process at a time is in such a block for one folder; another waits for its turn. What an earlier block left
    because its process was killed is cleared away; a folder that it had moved aside comes back first.

    Args:
        folder: where to; parents are made, and what is there is replaced. Of a link, where it leads.

    Raises:
        CheckpointError: if this process works in the folder, which would be gone with the one that is replaced; if
            another process has been writing it for a minute; if the place cannot be written to.
    """
    folder = folder.resolve()
    if Path.cwd().is_relative_to(folder):
        raise CheckpointError(f"{folder} is the folder that this is run in, which cannot be replaced. Name a new one.")
    with _refusals(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.proxbit-lock"), folder, WAIT) as alone:
        with _refusals(folder):
            _tidy(folder, alone)
            place = folder.with_name(f".{folder.name}.proxbit-{uuid.uuid4().hex[:8]}")
            place.mkdir()
        try:
            with _refusals(folder):
                (place / _MARK).touch()
                (place / _NEW).mkdir()
            yield place / _NEW
            with _refusals(folder):
                put(place / _NEW, folder, place / _OLD)
        finally:
            shutil.rmtree(place / _NEW, ignore_errors=True)
            if not (place / _OLD).exists():  # What could not be put back waits for the next block.
                _discard(place)


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written: {error}.") from error


def _tidy(folder: Path, alone: bool) -> None:
    """Put back what a killed process had moved aside; if no other one can be writing, clear away the rest of it."""
    name = re.compile(re.escape(f".{folder.name}.proxbit-") + "[0-9a-f]{8}")
    for place in folder.parent.glob(f".{escape(folder.name)}.proxbit-*"):
        if not name.fullmatch(place.name) or place.is_symlink() or not place.is_dir():
            continue
        if any(place.iterdir()) and not (place / _MARK).is_file():
            continue
        if (place / _OLD).exists() and not folder.exists():
            (place / _OLD).rename(folder)
        if alone:
            _discard(place)


def _discard(place: Path) -> None:
    """Delete what `staged` made, the mark last: a process that is killed here leaves what can be told from others."""
    for part in (_NEW, _OLD):
        shutil.rmtree(place / part, ignore_errors=True)
    with suppress(OSError):
        if [each.name for each in place.iterdir()] == [_MARK]:
            (place / _MARK).unlink()
        place.rmdir()
