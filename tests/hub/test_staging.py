"""Folders that are written whole or not at all."""

import os
from pathlib import Path

import pytest

from proxbit.errors import CheckpointError
from proxbit.hub.staging import put, staged, sync


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


def test_what_a_killed_process_left_is_cleared_and_what_it_moved_aside_comes_back(tmp_path):
    """Killed between the two renames, it left no folder at all; the one that fails next must find the old one."""
    write(tmp_path / "place", "first")
    (tmp_path / "place").rename(tmp_path / ".place.old.12345678")
    (tmp_path / ".place.new.12345678").mkdir()
    (tmp_path / ".place.new.12345678" / "half").write_text("half")
    (tmp_path / ".places.new.1").mkdir()  # somebody else's
    with pytest.raises(OSError, match="no space"), staged(tmp_path / "place"):
        raise OSError("no space")
    assert (tmp_path / "place" / "sub" / "file").read_text() == "first"
    assert names(tmp_path) == [".places.new.1", "place"]


def test_a_name_is_no_pattern(tmp_path):
    (tmp_path / ".a.new.1").mkdir()
    write(tmp_path / "[a]", "first")
    assert names(tmp_path) == [".a.new.1", "[a]"]


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
