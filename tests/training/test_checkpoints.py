"""Manifests, which checkpoint a training resumes from, and what a killed one leaves."""

import hashlib
import json
import logging
import os

import pytest
from transformers.trainer_utils import get_last_checkpoint

from proxbit.errors import CheckpointError
from proxbit.training import checkpoints
from proxbit.training.checkpoints import (
    MANIFEST,
    STAGING,
    check_checkpoint,
    check_place,
    check_resumable,
    check_start,
    checkpoint_to_resume,
    commit,
    new_staging,
    recover,
    resume_from,
    rotate,
    write_manifest,
)

STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def make(folder, text="weights", manifest=True, states=STATES):
    """A made-up checkpoint of weights, a file in a folder, and what a training needs to go on."""
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_text(text)
    (folder / "shards" / "0").write_text("shard")
    for name in states:
        (folder / name).write_text("state")
    if manifest:
        write_manifest(folder)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def edit_manifest(folder, **changes):
    file = folder / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def said(caplog):
    """A function: the lines of the log so far."""
    caplog.set_level(logging.WARNING, logger="proxbit")
    return lambda: [record.getMessage() for record in caplog.records]


def test_what_a_manifest_says(tmp_path):
    folder = make(tmp_path / "checkpoint-1")
    found = json.loads((folder / MANIFEST).read_text())
    written = {"model.safetensors": "weights", "shards/0": "shard"} | dict.fromkeys(STATES, "state")
    expected = {
        name: {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()} for name, text in written.items()
    }
    assert found == {"format": 1, "files": expected}
    check_checkpoint(folder)
    (folder / "notes.txt").write_text("mine")
    check_checkpoint(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "shards" / "0").unlink(), "shards/0 is missing"),
        (lambda folder: (folder / "shards" / "0").write_text("shar"), "shards/0 has 4 bytes, and 5 by its manifest"),
        (lambda folder: (folder / "model.safetensors").write_text("Weights"), "model.safetensors is damaged: its SHA"),
        (lambda folder: (folder / MANIFEST).unlink(), f"it has no {MANIFEST}"),
        (lambda folder: (folder / MANIFEST).write_text('{"format": 1, "fi'), f"its {MANIFEST} is damaged"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), f"its {MANIFEST} is damaged"),
        (lambda folder: edit_manifest(folder, files={"model.safetensors": 3}), f"its {MANIFEST} is damaged"),
        (lambda folder: edit_manifest(folder, files={"../../secret": {"size": 1, "sha256": ""}}), "secret is missing"),
        (lambda folder: edit_manifest(folder, format=2), "has format 2, and this version reads 1"),
    ],
    ids=["missing", "size", "bytes", "no manifest", "half", "list", "no size", "outside", "newer"],
)
def test_damage_is_named_and_the_checkpoint_before_it_is_taken(tmp_path, said, damage, message):
    make(tmp_path / "checkpoint-5")
    newer = make(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume(tmp_path, True) == str(newer)
    damage(newer)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(newer)
    assert checkpoint_to_resume(tmp_path, True) == str(tmp_path / "checkpoint-5")
    (line,) = said()
    assert line.startswith(f"Passed over {newer}, which is not complete: ") and message in line


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    def fail(file):
        raise OSError(5, "Input/output error")

    folder = make(tmp_path / "checkpoint-5")
    monkeypatch.setattr(checkpoints, "sha256", fail)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read: .*Input/output error"):
        check_checkpoint(folder)


def test_checkpoints_go_by_number(tmp_path):
    for step in (9, 10, 100):
        make(tmp_path / f"checkpoint-{step}")
    make(tmp_path / "checkpoint-best")
    make(tmp_path / "checkpoint-1000-copy")
    (tmp_path / "checkpoint-200").write_text("a file")
    assert checkpoint_to_resume(tmp_path, True) == str(tmp_path / "checkpoint-100")


@pytest.mark.parametrize("nothing", [None, False])
def test_resuming_from_nothing(tmp_path, nothing):
    make(tmp_path / "checkpoint-5")
    assert checkpoint_to_resume(tmp_path, nothing) is None


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .* to resume from\. Name a folder"):
        checkpoint_to_resume(tmp_path / "none", True)
    make(tmp_path / "checkpoint-5", manifest=False)
    with pytest.raises(CheckpointError, match=rf"Not complete: checkpoint-5 \(it has no {MANIFEST}\)"):
        checkpoint_to_resume(tmp_path, True)


def test_a_checkpoint_that_is_named(tmp_path, said):
    folder = make(tmp_path / "any name")
    assert checkpoint_to_resume(tmp_path, str(folder)) == str(folder) and said() == []
    (folder / "model.safetensors").write_text("Weights")
    with pytest.raises(CheckpointError, match="not complete: model.safetensors is damaged.* delete its"):
        checkpoint_to_resume(tmp_path, str(folder))
    (folder / MANIFEST).unlink()
    assert checkpoint_to_resume(tmp_path, str(folder)) == str(folder)
    assert said() == [f"{folder} has no {MANIFEST}: whether it is complete is not known."]
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        checkpoint_to_resume(tmp_path, str(tmp_path / "other"))
    for place in (STAGING, new_staging()):
        with pytest.raises(CheckpointError, match="what a save that was cut short has left"):
            checkpoint_to_resume(tmp_path, str(make(tmp_path / place / "checkpoint-5", manifest=False)))


@pytest.mark.parametrize(
    ("states", "missing"),
    [
        (STATES[3:], "optimizer, scheduler, random state"),
        (STATES[1:], "optimizer"),
        ((STATES[0], *STATES[2:]), "scheduler"),
        ((*STATES[:2], STATES[3]), "random state"),
        (STATES[:3], "state of the Trainer"),
        ((), "optimizer, scheduler, random state, state of the Trainer"),
    ],
    ids=["weights only", "optimizer", "scheduler", "random state", "trainer", "nothing"],
)
@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "none"])
def test_half_a_checkpoint_is_passed_over_and_refused_by_name(tmp_path, said, states, missing, manifest):
    """As `save_only_model=True` writes them, and as somebody may have made them smaller."""
    whole = make(tmp_path / "checkpoint-5")
    half = make(tmp_path / "checkpoint-10", states=states, manifest=manifest)
    assert checkpoint_to_resume(tmp_path, True) == str(whole)
    (line,) = said()
    assert line.startswith(f"Passed over {half}, which is not complete: it h")
    with pytest.raises(CheckpointError, match=rf"cannot be resumed from: it holds no {missing} \(save_only_model=True"):
        checkpoint_to_resume(tmp_path, str(half))


@pytest.mark.parametrize(
    "states",
    [
        ("optimizer.bin", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"),
        ("optimizer_0/__0_0.distcp", "scheduler.pt", "rng_state_0.pth", "trainer_state.json"),
        ("global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_state_0.pth", "trainer_state.json"),
    ],
    ids=["FSDP", "FSDP sharded", "DeepSpeed"],
)
def test_the_states_of_engines_are_known(tmp_path, states):
    for name in states:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("state")
    check_resumable(tmp_path)


@pytest.mark.parametrize("word", ["TRUE", "Last", True])
def test_words_for_the_last_checkpoint(tmp_path, word):
    folder = make(tmp_path / "checkpoint-5")
    assert resume_from(word) is True and checkpoint_to_resume(tmp_path, word) == str(folder)
    check_start(tmp_path, resume_from(word))


@pytest.mark.parametrize("word", ["False", False])
def test_words_for_no_checkpoint(tmp_path, word):
    make(tmp_path / "checkpoint-5")
    assert resume_from(word) is None and checkpoint_to_resume(tmp_path, word) is None


def test_a_command_is_told_how_to_go_on(tmp_path):
    check_start(tmp_path / "new", None)
    folder = make(tmp_path / "checkpoint-5")
    with pytest.raises(CheckpointError, match=r"a training with checkpoint-5; .*: --resume_from_checkpoint last\."):
        check_start(tmp_path, None)
    with pytest.raises(CheckpointError, match="'checkpoint-5.x' is no checkpoint. Name a folder, or `last`"):
        check_start(tmp_path, "checkpoint-5.x")
    assert resume_from(str(folder)) == str(folder)


def test_commit_replaces_what_is_there(tmp_path):
    make(tmp_path / "checkpoint-5", "old")
    staging = tmp_path / new_staging()
    make(staging / "checkpoint-5", "new", manifest=False)
    assert commit(staging, tmp_path, "checkpoint-5") == tmp_path / "checkpoint-5"
    assert (tmp_path / "checkpoint-5" / "model.safetensors").read_text() == "new"
    assert names(tmp_path) == ["checkpoint-5"]
    check_checkpoint(tmp_path / "checkpoint-5")


def test_no_glob_takes_the_staging_folder_for_a_checkpoint(tmp_path):
    make(tmp_path / STAGING / "checkpoint-9")
    assert get_last_checkpoint(str(tmp_path)) is None and list(tmp_path.glob("checkpoint-*")) == []


@pytest.fixture(params=["", "/0123abcd"], ids=["of all runs", "of one run"])
def staging(tmp_path, request):
    """Where a save was cut short: runs had one folder for all of them once."""
    return tmp_path / f"{STAGING}{request.param}"


def test_what_a_killed_save_left_is_removed(tmp_path, said, staging):
    make(tmp_path / "checkpoint-5")
    make(staging / "checkpoint-10", manifest=False)
    recover(tmp_path)
    assert names(tmp_path) == ["checkpoint-5"]
    (line,) = said()
    assert line.startswith("Removed what a save that was cut short has left") and "checkpoint-10: it has no" in line
    recover(tmp_path)
    assert len(said()) == 1


@pytest.mark.parametrize("aside", [False, True], ids=["before the renames", "between them"])
def test_a_complete_checkpoint_that_was_not_renamed_is_put_in_its_place(tmp_path, said, aside, staging):
    make(staging / "checkpoint-10", "new")
    make(staging / "replaced" if aside else tmp_path / "checkpoint-10", "old")
    recover(tmp_path)
    assert names(tmp_path) == ["checkpoint-10"]
    assert (tmp_path / "checkpoint-10" / "model.safetensors").read_text() == "new"
    assert said() == ["Put checkpoint-10 in its place: it was complete, but had not been renamed."]


def test_what_another_run_may_be_saving_stays(tmp_path, said):
    """Where there are no locks nobody knows; what is complete is put in its place all the same."""
    make(tmp_path / STAGING / "0123abcd" / "checkpoint-10", manifest=False)
    make(tmp_path / STAGING / "89abcdef" / "checkpoint-20")
    recover(tmp_path, alone=False)
    assert names(tmp_path) == [STAGING, "checkpoint-20"] and names(tmp_path / STAGING) == ["0123abcd"]
    assert said() == ["Put checkpoint-20 in its place: it was complete, but had not been renamed."]
    make(tmp_path / STAGING / "89abcdef" / "checkpoint-30", manifest=False)
    assert commit(tmp_path / STAGING / "89abcdef", tmp_path, "checkpoint-30") == tmp_path / "checkpoint-30"
    assert names(tmp_path / STAGING) == ["0123abcd"]


def test_what_no_save_has_made_stays(tmp_path):
    """Whatever it lies in, and whatever it is called."""
    make(tmp_path / STAGING / "0123abcd" / "checkpoint-10", manifest=False)
    for name in ("0123abcd/checkpoint-best", "backup/checkpoint-5", "notes"):
        make(tmp_path / STAGING / name)
    recover(tmp_path)
    assert names(tmp_path / STAGING) == ["0123abcd", "backup", "notes"]
    assert names(tmp_path / STAGING / "0123abcd") == ["checkpoint-best"]
    assert names(tmp_path / STAGING / "backup") == ["checkpoint-5"]


def test_rotation_leaves_what_no_trainer_has_made(tmp_path):
    (tmp_path / "checkpoint-2024").mkdir()
    (tmp_path / "checkpoint-2024" / "notes.txt").write_text("mine")
    for step in (2, 4):
        make(tmp_path / f"checkpoint-{step}")
    make(tmp_path / STAGING / "0123abcd" / "checkpoint-6")  # of another run
    rotate(tmp_path, 1, {str(tmp_path / "checkpoint-4")})
    assert names(tmp_path) == [STAGING, "checkpoint-2024", "checkpoint-4"]
    check_checkpoint(tmp_path / STAGING / "0123abcd" / "checkpoint-6")


def test_rotation_keeps_the_new_one_behind_a_damaged_one(tmp_path):
    """By numbers alone 10 would stay, which is damaged, and 6 would go."""
    for age, step in enumerate((2, 4, 10, 6)):
        folder = make(tmp_path / f"checkpoint-{step}", manifest=step != 10)
        (folder / "trainer_state.json").touch()
        os.utime(folder, ns=(age, age))
    rotate(tmp_path, None, set())
    rotate(tmp_path, 0, set())
    assert len(names(tmp_path)) == 4
    rotate(tmp_path, 2, {str(tmp_path / "checkpoint-6"), str(tmp_path / "checkpoint-4"), None})
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    rotate(tmp_path, 1, {str(tmp_path / "checkpoint-6"), None})
    assert names(tmp_path) == ["checkpoint-6"]


def test_what_cannot_be_deleted_stays(tmp_path):
    """A file lies where the staging folder would."""
    for step in (2, 4):
        make(tmp_path / f"checkpoint-{step}")
    (tmp_path / STAGING).write_text("mine")
    rotate(tmp_path, 1, {str(tmp_path / "checkpoint-4")})
    assert names(tmp_path) == [STAGING, "checkpoint-2", "checkpoint-4"]
    check_checkpoint(tmp_path / "checkpoint-2")


def test_a_place_where_nothing_can_be_written(tmp_path):
    check_place(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match='No checkpoint can be written into .*file: Not a directory.*"no"'):
        check_place(tmp_path / "file")
