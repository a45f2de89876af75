"""The documents that are written from the code are not stale."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from proxbit.quantizers import PAIRS, get_pair

DOCS = Path(__file__).parents[1] / "docs"
BENCHMARKS = DOCS.parent / "benchmarks"
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def script(file):
    """A program of the repository, as a module."""
    specification = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The gallery, written anew."""
    gallery = script(DOCS / "gallery.py")
    folder = tmp_path_factory.mktemp("docs")
    gallery.write(folder)
    return folder


def test_the_page_of_pairs_is_what_the_code_says(fresh):
    assert (DOCS / "pairs.md").read_text() == (fresh / "pairs.md").read_text(), "run: python docs/gallery.py"


def test_the_page_of_fields_is_what_the_code_says(tmp_path):
    script(DOCS / "fields.py").write(tmp_path)
    assert (DOCS / "configuration.md").read_text() == (tmp_path / "configuration.md").read_text(), (
        "run: python docs/fields.py"
    )


def test_formulas_of_docstrings_become_code():
    text = "What.\n\nFormula (h = 1):\n    F = T \\circ P\n        more\n\nArgs:\n    x: one."
    found = script(DOCS / "formulas.py").as_code(text)
    assert "Formula (h = 1):\n    ```text\n    F = T ∘ P\n        more\n    ```\n\nArgs:\n    x: one." in found


def test_the_page_of_cards_is_what_the_code_says():
    assert (DOCS / "cards.md").read_text() == script(DOCS / "cards.py").page(), "run: python docs/cards.py"


def test_the_page_of_families_is_what_the_tests_hold(tmp_path):
    script(DOCS / "families.py").write(tmp_path)
    assert (DOCS / "families.md").read_text() == (tmp_path / "families.md").read_text(), "run: python docs/families.py"


def test_where_pairs_are_chosen_their_pull_is_told_of():
    """The steps of `proxquant` and `rpc` must outweigh it; the gallery says so of each, with the default as it is."""
    gallery = (DOCS / "pairs.md").read_text()
    sections = {name: gallery.split(f"\n## {name}\n")[1].split("\n## ")[0] for name in PAIRS}
    pulling = {name for name in PAIRS if get_pair(name).update_from is not None}
    assert {name for name, section in sections.items() if "`mu_end`" in section} == pulling
    assert all(f"the default of {get_pair(name).schedule[2]:g} outweighs" in sections[name] for name in pulling)
    readme = (DOCS / "concepts.md").read_text()
    told = next(part for part in readme.split("\n\n") if "mu_end=" in part)
    assert all(f"`{name}`" in told for name in pulling)
    assert all(f"ends at {get_pair(name).schedule[2]:g}." in told for name in pulling)


def test_the_page_of_costs_says_which_targets_are_missed():
    """Those of `bnn++`, with the numbers of its own row further down."""
    benchmark, page = script(BENCHMARKS / "quantizers.py"), (BENCHMARKS / "results" / "quantizers.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| `bnn++` |")).strip(" |").split(" | ")
    lines = benchmark.against_targets(*(float(row[column]) for column in (2, 4, 6)))
    assert "\n".join(["", *lines, ""]) in page
    verdicts = [line.strip(" |").split(" | ")[-1] for line in benchmark.against_targets(1.5, 1.01, 3.2)[2:]]
    assert verdicts == ["met", "**missed**", "**missed**"]


def test_the_pictures_show_what_the_code_computes(fresh):
    """The same text and the same shapes; coordinates to a tenth of a point, for another machine rounds otherwise."""
    drawn = sorted(path.name for path in (fresh / "pairs").iterdir())
    assert drawn == sorted(path.name for path in (DOCS / "pairs").iterdir()), "run: python docs/gallery.py"
    for name in drawn:
        old, new = ((folder / "pairs" / name).read_text() for folder in (DOCS, fresh))
        assert NUMBER.sub("", old) == NUMBER.sub("", new), name
        numbers = [np.array(NUMBER.findall(text), dtype=float) for text in (old, new)]
        np.testing.assert_allclose(*numbers, rtol=0, atol=0.1, err_msg=name)


def test_the_first_hour_took_every_step():
    """The page of what commands printed shows the commands of today."""
    page, steps = (DOCS / "walkthrough.md").read_text(), script(DOCS / "walkthrough.py").STEPS
    assert re.findall(r"^\$ (.*)$", page, re.MULTILINE) == [
        command for command in steps.values() if "\n" not in command
    ]
    assert all(words in page and command in page for words, command in steps.items())
