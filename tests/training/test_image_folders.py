"""Images as users have them: what is read, what is left out, and whose labels they bear."""

import unicodedata
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image

from picture_folders import CLASSES, READABLE, UNREADABLE, odd_folder
from proxbit.errors import DataError
from proxbit.training.image_folders import (
    Images,
    LeftOut,
    check_classes,
    class_names,
    load_splits,
    pick_split,
    read_images,
    relabel,
    unlabelled,
)
from proxbit.training.labels import match_labels, numbers_of_labels

LABEL2ID = {"flower": 0, "other": 1, "temple": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photographs):
    return odd_folder(tmp_path_factory.mktemp("pictures"), photographs)


@pytest.fixture(scope="module")
def images(folder):
    return read_images(load_splits(str(folder))["train"])


def test_what_cannot_be_read_is_left_out_with_a_reason(folder, images):
    assert len(images.dataset) == READABLE
    found = {each.picture: each.reason for each in images.left_out}
    assert set(found) == {str(folder / "temple" / UNREADABLE[0]), str(folder / "flower" / UNREADABLE[1])}
    assert "truncated" in found[str(folder / "temple" / "cut.jpg")].casefold()
    assert found[str(folder / "flower" / "text.jpg")] == "not an image"


def test_a_picture_without_a_label_is_left_out(photographs):
    """`ClassLabel` knows such."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [Image.fromarray(each) for each in photographs[:2]] * 2, "label": [1, None, 0, 1]}
    found = read_images(datasets.Dataset.from_dict(rows, features))
    assert found.dataset["label"] == [1, 0, 1]
    assert [(each.picture, each.reason) for each in found.left_out] == [("image 1", "no label")]


def test_every_picture_is_in_rgb_and_upright(folder, images):
    """The turned ones have their sides swapped, and every pixel is where a viewer shows it."""
    modes = {image.mode for image in images.dataset["image"]}
    assert modes == {"RGB"}
    stored = Image.open(folder / "flower" / "turned.jpg")
    upright = np.rot90(np.asarray(stored), -1)
    assert any(np.array_equal(np.asarray(image), upright) for image in images.dataset["image"])


def test_the_watcher_sees_every_picture(folder):
    seen = []

    def watch(items, total):
        seen.append(total)
        yield from items

    read_images(load_splits(str(folder))["train"], watch)
    assert seen == [READABLE + len(UNREADABLE)]


def test_classes_are_the_folders_and_get_the_numbers_of_the_model(images):
    assert images.names == tuple(sorted(CLASSES))
    numbers = match_labels(images.names, LABEL2ID, "the model")
    assert numbers == {0: 0, 1: 2}
    assert sorted(relabel(images, numbers, "the model")["label"]) == [0] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("names", "label2id", "expected"),
    [
        (["a", "b"], {"b": 1, "a": 0}, {0: 0, 1: 1}),
        (["tiger_cat", "Egyptian-cat"], {"egyptian cat": 5, "Tiger cat": 3}, {0: 3, 1: 5}),
        (None, {"x": 0, "y": 1}, {0: 0, 1: 1}),
    ],
    ids=["the same", "spelled otherwise", "numbers only"],
)
def test_labels_match(names, label2id, expected):
    assert match_labels(names, label2id, "the model") == expected


def test_strange_classes_are_refused_with_both_lists():
    with pytest.raises(DataError, match="no labels of 'm': 'dog'. Its labels are: 'flower', 'other', 'temple'"):
        match_labels(["dog", "flower"], LABEL2ID, "'m'")


@pytest.mark.parametrize("names", [["A", "B"], ["a", "b"], ["A", "a"], ["B", "-a"]])
def test_a_label_of_that_very_name_comes_first(names):
    letters = ["A", "B", "C", "a", "b", "c", "-A"]
    label2id = {letter: i for i, letter in enumerate(letters)} | {"- a": 7, "-a": 8}
    numbers = match_labels(names, label2id, "the model")
    assert numbers == {i: label2id[name] for i, name in enumerate(names)}


def test_a_class_that_may_be_several_labels_is_refused():
    with pytest.raises(DataError, match="'TIGER-CAT' of the images may be any of these labels of 'm': 'tiger cat', "):
        match_labels(["dog", "TIGER-CAT"], {"tiger cat": 0, "Tiger_cat": 1, "dog": 2}, "'m'")


@pytest.mark.parametrize("names", [["Cat", "cat"], ["cat", "CAT"], ["CAT", "Cat"]])
def test_two_classes_of_one_label_are_refused(names):
    message = f"'{names[0]}' and '{names[1]}' of the images are both the label 'cat' of 'm'.*labels: 'dog', 'cat'"
    with pytest.raises(DataError, match=message):
        match_labels(names, {"dog": 0, "cat": 1}, "'m'")


def test_a_label_without_a_class_is_refused(images):
    """As in the test split of datasets whose labels are secret."""
    secret = images.dataset.remove_columns("label").add_column("label", [-1] * READABLE)
    with pytest.raises(DataError, match=r"labels \[-1\]"):
        relabel(Images(secret, None, ()), {0: 0, 1: 1}, "the model")


def test_splits_are_those_of_the_folder(tmp_path, photographs):
    for name in ("train", "test"):
        odd_folder(tmp_path / name, photographs)
    splits = load_splits(str(tmp_path))
    assert set(splits) == {"train", "test"}
    assert pick_split(splits, None, ["test", "validation"]) == "test"
    assert pick_split(splits, "train", ["test"]) == "train"
    with pytest.raises(DataError, match="no split 'dev'; there are: train, test"):
        pick_split(splits, "dev", [])
    with pytest.raises(DataError, match="Which split"):
        pick_split(splits, None, ["validation"])


@pytest.mark.parametrize("what", ["nowhere", "empty", "file", "unreadable"])
def test_what_is_no_folder_of_pictures_is_refused(tmp_path, what):
    path = tmp_path / what
    if what == "file":
        path.write_text("x")
    elif what != "nowhere":
        path.mkdir()
    if what == "unreadable":
        (path / "cat").mkdir()
        (path / "cat" / "1.jpg").write_text("x")
    with pytest.raises(DataError):
        read_images(load_splits(str(path))["train"])


def test_other_columns_do_not_matter_and_other_names_are_understood(photographs):
    data = datasets.Dataset.from_dict({"img": [Image.fromarray(photographs[0][:9, :9])] * 2, "labels": [1, 0]})
    read = read_images(data.cast_column("img", datasets.Image()))
    assert read.dataset.column_names == ["image", "label"] and class_names(data) is None
    assert list(read.dataset["label"]) == [1, 0]
    with pytest.raises(DataError, match="One column of images"):
        read_images(data.remove_columns("labels"))


@pytest.mark.parametrize("names", [["café", "thé"], ["thé", "café"]])
def test_labels_match_in_any_normal_form(names):
    label2id = {unicodedata.normalize("NFD", name): i for i, name in enumerate(["café", "thé", "lait"])}
    assert match_labels(names, label2id, "m") == {i: ["café", "thé"].index(name) for i, name in enumerate(names)}
    both = {"café": 3, **label2id}
    assert match_labels(["café", "lait"], both, "m") == {0: 3, 1: 2}, "that very name comes first"


@pytest.mark.parametrize("label2id", [None, {}])
def test_numbers_of_labels_come_from_their_names(label2id):
    assert numbers_of_labels(SimpleNamespace(label2id=label2id, id2label={0: "a", 1: "b"})) == {"a": 0, "b": 1}
    assert numbers_of_labels(SimpleNamespace(label2id={"c": 3}, id2label={0: "a"})) == {"c": 3}


@pytest.mark.parametrize(
    ("labels", "unread", "words"),
    [
        ([0, 0], {}, "photos, test holds one class only, 'cat', with 2 images; .* such as DATA/cat/1.jpg"),
        ([0], {1: LeftOut("d\n.jpg", "an empty file")}, r"these classes can be read: 'dog'; .*d\\n.jpg: an empty file"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused(labels, unread, words):
    found = Images(datasets.Dataset.from_dict({"label": labels}), ("cat", "dog"), tuple(unread.values()), unread)
    with pytest.raises(DataError, match=words):
        check_classes(found, "photos, test")
    check_classes(Images(datasets.Dataset.from_dict({"label": [0, 1]}), ("cat", "dog", "none"), ()), "photos")


def test_names_of_others_are_escaped_in_errors():
    with pytest.raises(DataError) as refused:
        match_labels(["\x1b[2J\nError: x"], LABEL2ID, "m")
    assert str(refused.value).isprintable()


def test_pictures_of_a_hub_are_shown_by_the_same_rules():
    deep = Image.fromarray(np.tile(np.arange(256, dtype=np.uint16) * 257, (8, 1)))
    data = datasets.Dataset.from_dict({"image": [deep, deep], "label": [0, 1]})
    read = read_images(data.cast_column("image", datasets.Image()))
    for shown in (read.dataset[0]["image"], read.dataset.train_test_split(0.5, seed=0)["test"]["image"][0]):
        assert shown.mode == "RGB" and np.array_equal(np.asarray(shown)[0, :, 0], np.arange(256))


def test_images_without_labels_are_shown_by_the_same_rules(tmp_path):
    Image.fromarray(np.full((9, 9), 65535, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (9, 9)).save(tmp_path / "clear.png")
    (tmp_path / "text.png").write_text("x")
    (tmp_path / "x.zip").write_bytes(b"x")
    left_out: list[LeftOut] = []
    shown = list(unlabelled(str(tmp_path), 0, left_out))
    assert [(each.mode, each.getextrema()) for each in shown] == [("RGB", ((255, 255),) * 3)] * 2
    assert {each.reason for each in left_out} == {"not an image", "an archive; unpack it"}
