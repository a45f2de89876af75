"""`proxbit evaluate` on folders as users have them, in a pipe; `test_app.py` looks at it in a terminal."""

import json
import shutil
import unicodedata

import pytest
from typer.testing import CliRunner

from picture_folders import CLASSES, READABLE, UNREADABLE, odd_folder, tiny_classifier
from proxbit.cli.app import app
from proxbit.errors import CheckpointError, DataError


@pytest.fixture(scope="module")
def place(tmp_path_factory, photographs):
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_classifier(folder / "model")
    odd_folder(folder / "photos", photographs)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "80"})


def test_json_alone_is_on_standard_output(place):
    done = run(place / "model", place / "photos", "--batch", 3, "--json")
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert (found["state"], found["split"], found["batch"], found["pictures"]) == ("float", "train", 3, READABLE)
    assert 0 <= found["accuracy"] <= 1 and found["latency_ms"] > 0 and found["pictures_per_second"] > 0
    assert found["classes"] == {"flower": 4, "temple": 4}
    assert sorted(each["picture"].rsplit("/")[-1] for each in found["left_out"]) == sorted(UNREADABLE)


def test_the_table_says_what_was_left_out(place):
    done = run(place / "model", place / "photos")
    assert done.exit_code == 0, done.exception
    assert "accuracy" in done.stdout and f"{len(UNREADABLE)} left out:" in done.stdout
    assert "photos, train" not in done.stdout
    assert f"{place / 'photos' / 'flower' / 'text.jpg'}: not an image" in done.stdout


def test_mistakes_are_told(place, tmp_path):
    tiny_classifier(tmp_path / "strange", names=("a", "b", "c"))
    refused = run(tmp_path / "strange", place / "photos").exception
    assert isinstance(refused, DataError) and all(repr(name) in str(refused) for name in (*CLASSES, "a", "b", "c"))
    assert isinstance(run(place / "model", tmp_path / "nowhere").exception, DataError)
    assert isinstance(run(place / "model", place / "photos", "--split", "test").exception, DataError)
    assert isinstance(run(tmp_path / "nowhere", place / "photos").exception, CheckpointError)
    (tmp_path / "strange" / "preprocessor_config.json").unlink()
    refused = run(tmp_path / "strange", place / "photos").exception
    assert isinstance(refused, CheckpointError) and "preprocessor_config.json" in str(refused)


def test_folders_and_labels_as_others_write_them(place, tmp_path):
    """Brackets in a path, NFD on disk, no label2id, a metadata file about something else: each is evaluated."""
    tiny_classifier(tmp_path / "model", names=("café", "lait", "thé"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["label2id"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    data = tmp_path / "photos [2024]"
    for name, its in zip(CLASSES, ("café", "thé")):
        shutil.copytree(place / "photos" / name, data / unicodedata.normalize("NFD", its))
    (data / "metadata.csv").write_text("file_name,place\nx,y\n")
    done = run(tmp_path / "model", data)
    assert done.exit_code == 0, done.exception
    assert "metadata.csv: has no columns" in done.stdout
    assert done.stdout.index("│ all") < done.stdout.index("3 left out:") < done.stdout.index("balanced accuracy")


@pytest.mark.parametrize("what", ["one class", "an unreadable class"])
def test_what_no_accuracy_can_be_measured_with_is_refused(place, tmp_path, what):
    shutil.copytree(place / "photos", tmp_path / "photos")
    shutil.rmtree(tmp_path / "photos" / "temple")
    if what == "an unreadable class":
        (tmp_path / "photos" / "temple").mkdir()
        (tmp_path / "photos" / "temple" / "1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    refused = run(place / "model", tmp_path / "photos").exception
    words = "holds one class only, 'flower', with 4" if what == "one class" else "can be read: 'temple'; 2 files"
    assert isinstance(refused, DataError) and words in str(refused)
