"""What commands say of images: counts, what was left out, and nothing that a terminal obeys."""

import io

import datasets
from rich.console import Console

from proxbit.cli.images import tell_images, tell_left_out
from proxbit.training.image_folders import Images, LeftOut, Splits


def images(labels, names, *left_out):
    return Images(datasets.Dataset.from_dict({"label": labels}), names, left_out)


def told(tell, *arguments, terminal=False):
    stream = io.StringIO()
    tell(Console(file=stream, width=60, force_terminal=terminal, color_system=None), *arguments)
    return stream.getvalue()


def rows(text):
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]


def test_counts_of_each_class_and_part():
    splits = Splits({name: datasets.Dataset.from_dict({"x": [1] * 5}) for name in ("train", "validation", "test")})
    splits.left_out, splits.litter = (LeftOut("a/x.md", "beside"),), 3
    parts = {"train": images([0, 0, 1], ("cat", "d\x1b[2Jog")), "validation": images([1], ("cat", "d\x1b[2Jog"))}
    for terminal in (False, True):
        text = told(tell_images, splits, ["train", "validation"], parts, terminal=terminal)
        assert rows(text) == [["cat", "2", "0"], [r"d\x1b[2Jog", "1", "1"], ["all", "3", "1"]]
        assert "not used: test (5 files)" in text and "a/x.md: beside" in text and "passed over: 3 hidden" in text


def test_many_classes_are_summed_up():
    names = tuple(f"c{i:03}" for i in range(100))
    text = told(tell_images, Splits(), [], {"train": images([*range(100), 99], names)})
    assert len(rows(text)) == 21 and rows(text)[19] == ["81 other classes", "1 to 2 each"]
    assert rows(text)[20] == ["all", "101"]


def test_numbers_without_names():
    assert rows(told(tell_images, Splits(), [], {"x": images([7, 7, 3], None)}))[:2] == [["3", "1"], ["7", "2"]]


def test_many_files_of_one_reason_are_summed_up():
    files = [LeftOut(f"{i}\n.jpg", "an empty file") for i in range(50)]
    lines = told(tell_left_out, [*files, LeftOut("x.zip", "an archive")]).splitlines()
    assert lines[0] == "51 left out:" and lines[1] == r"  0\n.jpg: an empty file" and len(lines) == 23
    assert lines[21] == "  ... and 30 more: an empty file" and lines[22] == "  x.zip: an archive"
    assert told(tell_left_out, []) == ""
