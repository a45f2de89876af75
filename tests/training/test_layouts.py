"""Where images lie: splits and classes by their place alone, and every other file in a list."""

import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from proxbit.errors import DataError
from proxbit.training.image_folders import load_splits, read_images
from proxbit.training.layouts import layout_of, unlabelled_files


def image(path, value=99):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((5, 6, 3), value, np.uint8)).save(path)


def seen(folder):
    """Of each split: how many images were taken, the classes, how many files were left out."""
    read = {name: read_images(split) for name, split in load_splits(str(folder)).items()}
    return {name: (len(each.dataset), each.names, len(each.left_out)) for name, each in read.items()}


def reasons(folder):
    """What was left out, and why; with what belongs to no split."""
    splits = load_splits(str(folder))
    listed = [*splits.left_out, *(each for split in splits.values() for each in read_images(split).left_out)]
    return {os.path.relpath(each.picture, folder): each.reason for each in listed}


@pytest.mark.parametrize(
    ("classes", "name"),
    [
        (("cat", "dog"), "rapid-test-7"),
        (("cat", "dog"), "toy-train-3"),
        (("bus", "car", "train"), "1"),
        (("fail", "pass", "test"), "1"),
        (("Dev", "Val"), "validation"),
        (("a*b?", "photos [2024]"), "[x]"),
    ],
)
def test_words_in_names_make_no_splits(tmp_path, classes, name):
    data = tmp_path / "train [val] test"
    for each in classes:
        image(data / each / "0.jpg")
        image(data / each / f"{name}.jpg")
    assert seen(data) == {"train": (2 * len(classes), classes, 0)}


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("Training", "Testing"), ("train", "test")),
        (("TRAIN", "valid", "test"), ("train", "validation", "test")),
        (("train", "Dev"), ("train", "validation")),
        (("val", "testing"), ("validation", "test")),
    ],
)
def test_folders_of_splits_in_any_case(tmp_path, folders, splits):
    for k, folder in enumerate(folders):
        for name in ("glioma", "none"):
            for i in range(k + 1):
                image(tmp_path / folder / name / f"{i}.png")
    assert seen(tmp_path) == {split: (2 * k + 2, ("glioma", "none"), 0) for k, split in enumerate(splits)}


def test_two_folders_of_one_split_are_refused(tmp_path):
    image(tmp_path / "val" / "cat" / "1.png")
    image(tmp_path / "Validation" / "cat" / "1.png")
    with pytest.raises(DataError, match="Validation and val are both the split validation"):
        layout_of(tmp_path)


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (
            ["cat/2021/1.jpg", "dog/2022/1.jpg"],
            r"2 of 2 images at another depth .* as cat/2021/1.jpg\. Images",
        ),
        (["1.jpg", "cat/1.jpg", "dog/1.jpg"], "1 of 3 images at another depth .* such as 1.jpg"),
        (["1.jpg", "2.jpg"], "2 of 2 images at another depth"),
        (["train/cat/a/1.jpg", "train/dog/1.jpg"], "1 of 2 images at another depth .* such as train/cat/a/1.jpg"),
        (["photos/train/cat/1.jpg", "photos/train/dog/1.jpg"], "If its classes are the folders in .*photos, name that"),
    ],
)
def test_pictures_at_another_depth_are_refused_with_the_layout(tmp_path, paths, words):
    for path in paths:
        image(tmp_path / path)
    with pytest.raises(DataError, match=words) as refused:
        layout_of(tmp_path)
    assert "DATA/train/cat/1.jpg" in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_without_pictures_is_refused_with_what_there_is(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds no images; 1 left out. .*a\.heic"):
        layout_of(tmp_path)


def test_every_file_is_taken_or_listed_or_litter(tmp_path):
    for name in ("a.jpg", "b.JPG", "c.jpeg"):
        image(tmp_path / "cat" / name)
    image(tmp_path / "dog" / "d.png")
    (tmp_path / "cat" / "c.jpeg").rename(tmp_path / "cat" / "c")
    others = ["cat/IMG.HEIC", "cat/x.zip", "x.zip", "cat/notes.txt", "cat/old/notes.txt", "cat/e.eps"]
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "cat" / "empty.jpg").touch()
    (tmp_path / "bird").mkdir()
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    links = {"broken.jpg": "nowhere", "zero.jpg": "/dev/zero", "back": "..", "self.jpg": "self.jpg"}
    for name, target in links.items():
        (tmp_path / "cat" / name).symlink_to(target)
    for litter in (".DS_Store", "._a.jpg", "Thumbs.db", ".ipynb_checkpoints/a.jpg", "__MACOSX/a.jpg"):
        image(tmp_path / "cat" / "litter.jpg")
        (tmp_path / "cat" / litter).parent.mkdir(exist_ok=True)
        (tmp_path / "cat" / "litter.jpg").rename(tmp_path / "cat" / litter)
    found = reasons(tmp_path)
    listed = [*others, "bird", "cat/c", "cat/empty.jpg", "cat/pipe.jpg", *(f"cat/{name}" for name in links)]
    assert sorted(found) == sorted(listed)
    assert found["cat/x.zip"] == "an archive; unpack it" and found["cat/empty.jpg"] == "an empty file"
    assert "no extension" in found["cat/c"] and ".eps is no format" in found["cat/e.eps"]
    assert found["cat/back"] == "a link to a folder above it" and found["cat/broken.jpg"] == "a link to nothing"
    assert found["cat/pipe.jpg"] == found["cat/zero.jpg"] == "neither a file nor a folder"
    splits = load_splits(str(tmp_path))
    assert splits.litter == 5 and splits["train"].features["label"].names == ["bird", "cat", "dog"]
    assert seen(tmp_path)["train"][0] == 3


def test_a_class_of_files_that_are_no_pictures_is_a_class(tmp_path):
    image(tmp_path / "cat" / "1.jpg")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "IMG_1.gz").write_bytes(b"x")
    assert seen(tmp_path) == {"train": (1, ("cat", "dog"), 1)}
    assert read_images(load_splits(str(tmp_path))["train"]).unread[1].reason == "an archive; unpack it"


def test_what_lies_beside_the_splits_is_listed(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            image(tmp_path / split / name / "1.png")
    image(tmp_path / "val" / "1.png")
    (tmp_path / "README.md").write_text("x")
    found = reasons(tmp_path)
    assert set(found) == {"val/1.png", "README.md"} and "beside the folders of the splits: " in found["val/1.png"]


def test_names_that_are_no_text_are_listed_and_paths_may_be_odd(tmp_path):
    image(tmp_path / "cat" / "x\ny.png")
    image(tmp_path / "dog" / "\x1b[2J.png")
    os.rename(tmp_path / "cat" / "x\ny.png", os.fsencode(tmp_path / "cat") + b"/\xff.png")
    image(tmp_path / "cat" / "x\ny.png")
    assert list(reasons(tmp_path).values()) == ["its name is not UTF-8"]
    assert seen(tmp_path) == {"train": (2, ("cat", "dog"), 1)}


def test_one_class_in_two_normal_forms_is_one(tmp_path):
    for form in ("NFC", "NFD"):
        image(tmp_path / unicodedata.normalize(form, "café") / "1.png")
    image(tmp_path / "thé" / "1.png")
    assert seen(tmp_path) == {"train": (3, ("café", "thé"), 0)}


def test_links_to_folders_of_classes_and_splits_are_followed(tmp_path):
    data = tmp_path / "data"
    for name in ("cat", "dog"):
        image(tmp_path / "store" / name / "1.png")
    data.mkdir()
    for split in ("train", "val"):
        (data / split).symlink_to(tmp_path / "store")
    assert seen(data) == dict.fromkeys(("train", "validation"), (2, ("cat", "dog"), 0))


@pytest.mark.parametrize(
    ("paths", "taken"),
    [
        (["train/1.png", "test/2.png"], ["train/1.png"]),
        (["Training/cat/1.png", "Testing/cat/2.png"], ["Training/cat/1.png"]),
        (["bus/1.png", "train/2.png"], ["bus/1.png", "train/2.png"]),
        (["1.png", "a/b/c/2.png"], ["1.png", "a/b/c/2.png"]),
    ],
)
def test_pictures_without_labels_may_lie_at_any_depth(tmp_path, paths, taken):
    for path in paths:
        image(tmp_path / path)
    (tmp_path / "x.zip").write_bytes(b"x")
    found, left_out = unlabelled_files(tmp_path)
    assert [str(each.relative_to(tmp_path)) for each in found] == taken
    assert [each.reason for each in left_out] == ["an archive; unpack it"] * (not taken[0].startswith(("train/1", "T")))


def flat(folder, count=4):
    for i in range(count):
        image(folder / f"{i}.png")


@pytest.mark.parametrize(
    ("labels", "names", "found"),
    [
        (("dog", "cat", "dog"), ("cat", "dog"), [1, 0, 1]),
        (("1", "0", "1"), None, [1, 0, 1]),
        (("true", "NA", "true"), ("NA", "true"), [1, 0, 1]),
        (("dog", "", "cat"), ("cat", "dog"), [1, 0]),
    ],
)
def test_labels_of_a_metadata_file(tmp_path, labels, names, found):
    flat(tmp_path)
    rows = "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels))
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + rows + f"9.png,{labels[0]}\n../x.png,{labels[0]}\n")
    images = read_images(load_splits(str(tmp_path))["train"])
    assert images.names == names and list(images.dataset["label"]) == found
    why = [each.reason for each in images.left_out]
    assert why.count("named in metadata.csv, but not there") == 2 and "not named in metadata.csv" in why
    assert why.count("no label") == labels.count("")


def test_a_metadata_file_in_each_split(tmp_path):
    for split in ("train", "test"):
        flat(tmp_path / split)
        lines = [f'{{"file_name": "{i}.png", "label": {i % 2}}}\n' for i in range(4)]
        (tmp_path / split / "metadata.jsonl").write_text("".join(lines))
    assert seen(tmp_path) == {"train": (4, None, 0), "test": (4, None, 0)}


@pytest.mark.parametrize("content", [b"file_name,place\ncat/0.png,x\n", b"\x80\x03\xff,\n", b"", b'a,"\n'])
def test_a_metadata_file_of_something_else_is_listed_beside_class_folders(tmp_path, content):
    for name in ("cat", "dog"):
        flat(tmp_path / name)
    (tmp_path / "metadata.csv").write_bytes(content)
    assert seen(tmp_path) == {"train": (8, ("cat", "dog"), 1)}
    assert "the folders of the classes count" in reasons(tmp_path)["metadata.csv"]
    flat(tmp_path / "other")
    (tmp_path / "other" / "metadata.csv").write_bytes(content)
    with pytest.raises(DataError, match="Its metadata file (has no columns|cannot be read)"):
        layout_of(tmp_path / "other")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_a_metadata_file_that_is_a_pipe_is_not_waited_for(tmp_path, name):
    for each in ("cat", "dog"):
        flat(tmp_path / each, 1)
    os.mkfifo(tmp_path / name)
    assert reasons(tmp_path) == {name: "neither a file nor a folder"}
