"""Folders that are written whole or not at all."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from proxbit.checkpoint.staging import put, staged, sync
from proxbit.errors import CheckpointError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder, text):
    with staged(folder) as made:
        (made / "sub").mkdir()
        (made / "sub" / "file").write_text(text)


def test_a_folder_takes_its_place_and_replaces_the_old_one(tmp_path):
    folder = tmp_path / "new" / "place"
    for text in ("first", "second"):
        write(folder, text)
        assert (folder / "sub" / "file").read_text() == text
        assert names(tmp_path / "new") == ["place"]


def test_a_failure_leaves_the_old_one(tmp_path):
    write(tmp_path / "place", "first")
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "place") as made:
        (made / "file").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "place" / "sub" / "file").read_text() == "first" and names(tmp_path) == ["place"]


def left(folder, number, **parts):
    """What a process that was killed in `staged` has left of a folder."""
    place = folder.with_name(f".{folder.name}.proxbit-{number}")
    for part, text in parts.items():
        (place / part / "sub").mkdir(parents=True)
        (place / part / "sub" / "file").write_text(text)
    (place / "proxbit_staging").touch()
    return place


def test_what_a_killed_process_left_is_cleared_and_what_it_moved_aside_comes_back(tmp_path):
    """Killed between the two renames, it left no folder at all; the one that fails next must find the old one."""
    left(tmp_path / "place", "12345678", old="first", new="half")
    (tmp_path / ".place.proxbit-0123abcd").mkdir()  # killed at once
    left(tmp_path / "places", "12345678", new="another folder's")
    with pytest.raises(OSError, match="no space"), staged(tmp_path / "place"):
        raise OSError("no space")
    assert (tmp_path / "place" / "sub" / "file").read_text() == "first"
    assert names(tmp_path) == [".places.proxbit-12345678", "place"]


def test_what_a_killed_process_left_of_a_folder_that_is_there_does_not_come_back(tmp_path):
    write(tmp_path / "place", "second")
    left(tmp_path / "place", "12345678", old="first")
    write(tmp_path / "place", "third")
    assert names(tmp_path) == ["place"] and (tmp_path / "place" / "sub" / "file").read_text() == "third"


OTHERS = (
    ".rel.old.backup",
    ".rel.new.1",
    ".rel.old.12345678",
    ".rel.proxbit-backup",
    ".rel.proxbit-1234567",
    ".rel.bak",
)


@pytest.mark.parametrize("name", [*OTHERS, ".rel.proxbit-deadbeef"])
def test_folders_of_others_stay(tmp_path, name):
    """Whatever they are called: the last one has the name, and not the mark."""
    (tmp_path / name / "new").mkdir(parents=True)
    (tmp_path / name / "new" / "file").write_text("mine")
    for text in ("first", "second"):
        write(tmp_path / "rel", text)
    assert names(tmp_path) == sorted([name, "rel"]) and (tmp_path / name / "new" / "file").read_text() == "mine"


def test_what_somebody_put_beside_it_stays(tmp_path):
    place = left(tmp_path / "rel", "12345678", new="half")
    (place / "notes.txt").write_text("mine")
    write(tmp_path / "rel", "first")
    assert names(place) == ["notes.txt", "proxbit_staging"]


def test_the_mark_goes_last(tmp_path, monkeypatch):
    """Killed while it deletes what another one left, a process leaves what can be told from a folder of others."""
    place = left(tmp_path / "rel", "12345678", old="first", new="half")
    write(tmp_path / "elsewhere", "first")
    (tmp_path / "elsewhere").rename(tmp_path / "rel")
    seen = []
    rmtree = shutil.rmtree

    def see(path, **options):
        rmtree(path, **options)
        if place in path.parents:
            seen.append(names(place))

    monkeypatch.setattr(shutil, "rmtree", see)
    write(tmp_path / "rel", "second")
    assert seen == [["old", "proxbit_staging"], ["proxbit_staging"]] and names(tmp_path) == ["rel"]


def test_without_a_lock_nothing_of_others_is_deleted(tmp_path, monkeypatch):
    """Another process may be at work: a half folder stays, and an old one comes back."""
    place = left(tmp_path / "rel", "12345678", old="first", new="half")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "rel"):
        raise KeyboardInterrupt
    assert (tmp_path / "rel" / "sub" / "file").read_text() == "first"
    assert names(place) == ["new", "proxbit_staging"]
    write(tmp_path / "rel", "second")
    assert (tmp_path / "rel" / "sub" / "file").read_text() == "second"


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(CheckpointError, match="rel could not be written: .*File exists"),
        staged(tmp_path / "file" / "rel"),
    ):
        raise AssertionError
    assert (tmp_path / "file").read_text() == "mine"


def test_an_old_folder_that_cannot_be_put_back_waits(tmp_path, monkeypatch):
    write(tmp_path / "rel", "first")
    rename = type(tmp_path).rename

    def refuse(self, target):
        if target.name == "rel":
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "rename", refuse)
        with pytest.raises(CheckpointError, match="Permission denied"):
            write(tmp_path / "rel", "second")
    assert not (tmp_path / "rel").exists()
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "rel"):
        raise KeyboardInterrupt
    assert (tmp_path / "rel" / "sub" / "file").read_text() == "first" and names(tmp_path) == ["rel"]


def test_a_name_is_no_pattern(tmp_path):
    left(tmp_path / "a", "12345678", new="another folder's")
    write(tmp_path / "[a]", "first")
    assert names(tmp_path) == [".a.proxbit-12345678", "[a]"]


def test_everything_is_on_disk_before_the_rename_and_the_rename_after_it(tmp_path, monkeypatch):
    """The order that a power failure asks for."""
    events = []
    fsync, rename = os.fsync, type(tmp_path).rename

    def see_sync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def see_rename(self, target):
        events.append(f"{self.name} -> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", see_sync)
    monkeypatch.setattr(type(tmp_path), "rename", see_rename)
    (tmp_path / "made" / "sub").mkdir(parents=True)
    (tmp_path / "made" / "sub" / "file").write_text("text")
    put(tmp_path / "made", tmp_path / "place", tmp_path / "aside")
    assert set(events[:3]) == {"made", "sub", "file"} and events[3:] == ["made -> place", tmp_path.name]


def test_a_place_that_cannot_be_taken_gives_the_old_one_back(tmp_path, monkeypatch):
    write(tmp_path / "place", "first")
    (tmp_path / "made").mkdir()
    rename = type(tmp_path).rename

    def refuse(self, target):
        if self.name == "made":
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", refuse)
    with pytest.raises(PermissionError):
        put(tmp_path / "made", tmp_path / "place", tmp_path / "aside")
    assert (tmp_path / "place" / "sub" / "file").read_text() == "first"
    assert names(tmp_path) == ["made", "place"]


def test_a_folder_that_is_not_there_cannot_be_synced(tmp_path):
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "nothing")


def test_the_folder_that_this_is_run_in_is_refused(tmp_path, monkeypatch):
    """It would be another one, and the shell be in none."""
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for folder in (Path("."), tmp_path / "here"):
        with pytest.raises(CheckpointError, match="is the folder that this is run in"), staged(folder):
            raise AssertionError
    assert names(tmp_path) == ["here"] and names(tmp_path / "here") == ["below"]


def test_a_link_stays_and_the_folder_that_it_leads_to_is_replaced(tmp_path):
    write(tmp_path / "disk" / "place", "first")
    (tmp_path / "place").symlink_to(tmp_path / "disk" / "place")
    write(tmp_path / "place", "second")
    assert (tmp_path / "place").is_symlink() and names(tmp_path) == ["disk", "place"]
    assert (tmp_path / "disk" / "place" / "sub" / "file").read_text() == "second"
    assert names(tmp_path / "disk") == ["place"]
