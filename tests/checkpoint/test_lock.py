"""Several processes and one lock: who gets it, who is refused, and what is left when one is killed."""

import errno
import fcntl
import logging
import multiprocessing
import os
import platform
import signal
import time

import pytest

from proxbit.checkpoint.staging import locked
from proxbit.errors import CheckpointError

FORK = multiprocessing.get_context("fork")


def hold(file, pipe, child=False):
    """Hold a lock until the process is killed; with a child that lives on."""
    with locked(file, file.parent) as held:
        if child:
            inheritor = FORK.Process(target=time.sleep, args=(60,))
            inheritor.start()
            held = inheritor.pid
        pipe.send(held)
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """A function that starts a process which holds the lock of a file; returns it, and what it says."""
    started = []

    def start(child=False):
        pipe, other = FORK.Pipe()
        process = FORK.Process(target=hold, args=(tmp_path / "out" / "lock", other, child))
        process.start()
        started.append(process)
        assert pipe.poll(30)
        return process, pipe.recv()

    yield start
    for process in started:
        process.kill()
        process.join()


def take(tmp_path, wait=0):
    return locked(tmp_path / "out" / "lock", tmp_path / "out", wait)


def test_the_second_is_refused_in_one_line_that_names_the_first(tmp_path, holder):
    process, _ = holder()
    with pytest.raises(CheckpointError) as error, take(tmp_path):
        raise AssertionError
    assert str(error.value) == (
        f"{tmp_path / 'out'} is being written by process {process.pid} on {platform.node()}. Wait until that has "
        "ended, or name another folder."
    )


def test_a_killed_process_holds_nothing_and_neither_do_those_it_has_forked(tmp_path, holder):
    process, inheritor = holder(child=True)
    process.kill()
    process.join()
    try:
        os.kill(inheritor, 0)  # lives
        with take(tmp_path) as held:
            assert held and (tmp_path / "out" / "lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(inheritor, signal.SIGKILL)
    assert list((tmp_path / "out").iterdir()) == []


def test_one_that_waits_gets_it_from_a_killed_one(tmp_path, holder, caplog):
    process, _ = holder()
    killer = FORK.Process(target=lambda: (time.sleep(0.2), os.kill(process.pid, signal.SIGKILL)))
    killer.start()
    with caplog.at_level(logging.WARNING, logger="proxbit"), take(tmp_path, wait=30) as held:
        assert held
    killer.join()
    (line,) = caplog.messages
    assert line.startswith(f"Waiting for process {process.pid} on ")


def test_one_that_waits_gets_a_file_of_its_own(tmp_path):
    """The first one takes its file away; who had waited for that one, locked, holds what others see."""
    with take(tmp_path):
        second, third = (FORK.Process(target=add, args=(tmp_path,)) for _ in range(2))
        second.start()
        third.start()
        time.sleep(0.2)
        (tmp_path / "sum").write_text("0")
    for process in (second, third):
        process.join()
    assert (tmp_path / "sum").read_text() == "20" and list((tmp_path / "out").iterdir()) == []


def add(tmp_path):
    for _ in range(10):
        with take(tmp_path, wait=30):
            before = int((tmp_path / "sum").read_text())
            time.sleep(0.002)
            (tmp_path / "sum").write_text(str(before + 1))


def test_the_same_process_is_refused_too_and_may_come_again(tmp_path):
    with take(tmp_path), pytest.raises(CheckpointError, match=f"process {os.getpid()} on"), take(tmp_path):
        raise AssertionError
    with pytest.raises(KeyboardInterrupt), take(tmp_path):
        raise KeyboardInterrupt
    with take(tmp_path) as held:
        assert held


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_a_line_says_so(tmp_path, monkeypatch, caplog, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING, logger="proxbit"), take(tmp_path) as held:
        assert not held
    assert caplog.messages == [
        f"{tmp_path / 'out'} cannot be locked ({os.strerror(number)}): see to it that no other process writes there."
    ]


def test_where_no_file_can_be_made(tmp_path, caplog):
    (tmp_path / "out").write_text("mine")
    with caplog.at_level(logging.WARNING, logger="proxbit"), take(tmp_path) as held:
        assert not held
    assert "cannot be locked" in caplog.messages[0] and (tmp_path / "out").read_text() == "mine"


def test_a_link_is_not_followed(tmp_path):
    """Who may write into the folder could otherwise have a file of somebody overwritten."""
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out" / "lock").symlink_to(tmp_path / "precious")
    with take(tmp_path) as held:
        assert not held
    assert (tmp_path / "precious").read_text() == "mine"


def test_what_others_wrote_into_the_file_is_made_printable(tmp_path):
    with take(tmp_path):
        (tmp_path / "out" / "lock").write_bytes(b"\x1b[2J\xff\nError: " + b"x" * 999)
        with pytest.raises(CheckpointError) as error, take(tmp_path):
            raise AssertionError
    assert "\x1b" not in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500
