"""Folders that one process at a time writes, whole or not at all: they are made elsewhere, synced, and renamed."""

import logging
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from filelock import FileLock, Timeout

from proxbit.errors import CheckpointError
from proxbit.foreign import printable

__all__ = ["locked", "put", "staged", "sync"]

# Seconds that a writer waits for another one of the same folder.
WAIT = 60
# In a folder that `staged` writes into: with its name it tells that proxbit made it.
_MARK = "proxbit_staging"
_NEW, _OLD = "new", "old"
# What is written to a folder may be written by everyone of a group, so each of them must be able to open the lock.
_LOCK_MODE = 0o664

logger = logging.getLogger(__name__)


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


@contextmanager
def locked(file: Path, folder: Path, wait: float = 0) -> Iterator[bool]:
    """Be the only one of all processes that is in such a block with this file.

    A process that is killed holds nothing, and neither do the processes that it has forked. The file says which process
    it is, and is gone when the block ends; after a kill it stays, unlocked, until the next one.

    Args:
        file: of the lock; made, and the folders above it.
        folder: what is written meanwhile, for the messages.
        wait: seconds to wait for another process.

    Yields:
        Whether the lock is held. It is not where the file system has no locks, or the file cannot be written: then a
        line of the log says so.

    Raises:
        CheckpointError: if another process holds the lock, naming it and the folder.
    """
    lock = FileLock(file, mode=_LOCK_MODE, thread_local=False, fallback_to_soft=False, on_acquired=_sign)
    try:
        _acquire(lock, file, folder, wait)
    except OSError as error:
        reason = printable(error.strerror or error)
        logger.warning("%s cannot be locked (%s): see to it that no other process writes there.", folder, reason)
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            with suppress(OSError):
                file.unlink()  # still locked: whoever waits for this file finds it gone, and makes another one
            with suppress(OSError):
                lock.release()


def _acquire(lock: FileLock, file: Path, folder: Path, wait: float) -> None:
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise
            logger.warning("Waiting for %s, which writes %s.", _holder(file), folder)
            lock.acquire(timeout=wait)
    except Timeout as error:
        raise CheckpointError(
            f"{folder} is being written by {_holder(file)}. Wait until that has ended, or name another folder."
        ) from error


def _sign(descriptor: int) -> None:
    """Write into the file of a lock which process holds it."""
    with suppress(OSError):  # A disk may be full; the lock holds without it.
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())


def _holder(file: Path) -> str:
    """The process that holds a lock, in words."""
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            found = stream.read(200).strip()
    except OSError:  # It has just ended; or this is Windows, where a locked file cannot be read.
        found = ""
    return printable(found) or "another process"
