"""The documents that are written from the code are not stale."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[1] / "docs"
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The gallery, written anew."""
    specification = importlib.util.spec_from_file_location("gallery", DOCS / "gallery.py")
    gallery = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(gallery)
    folder = tmp_path_factory.mktemp("docs")
    gallery.write(folder)
    return folder


def test_the_page_of_pairs_is_what_the_code_says(fresh):
    assert (DOCS / "pairs.md").read_text() == (fresh / "pairs.md").read_text(), "run: python docs/gallery.py"


def test_the_pictures_show_what_the_code_computes(fresh):
    """The same text and the same shapes; coordinates to a tenth of a point, for another machine rounds otherwise."""
    drawn = sorted(path.name for path in (fresh / "pairs").iterdir())
    assert drawn == sorted(path.name for path in (DOCS / "pairs").iterdir()), "run: python docs/gallery.py"
    for name in drawn:
        old, new = ((folder / "pairs" / name).read_text() for folder in (DOCS, fresh))
        assert NUMBER.sub("", old) == NUMBER.sub("", new), name
        numbers = [np.array(NUMBER.findall(text), dtype=float) for text in (old, new)]
        np.testing.assert_allclose(*numbers, rtol=0, atol=0.1, err_msg=name)
