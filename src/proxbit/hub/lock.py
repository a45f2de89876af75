"""One writer of a folder at a time: a lock that the kernel takes back when the process that holds it dies."""

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from proxbit.errors import CheckpointError
from proxbit.foreign import printable

__all__ = ["locked"]

# What is written to a folder may be written by everyone of a group, so each of them must be able to open the lock.
_MODE = 0o664

logger = logging.getLogger(__name__)


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
    lock = FileLock(file, mode=_MODE, thread_local=False, fallback_to_soft=False, on_acquired=_sign)
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
