"""Trainings in processes that are really killed, and what they leave: `trials/faults.py` injects them all."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Of the rows of the table: by what breaks and how; what the processes end with, and what they say.
ROWS = {
    ("`kill -9` in a save", "by the kernel, half of the weights written (RLIMIT_FSIZE)"): (["SIGXFSZ"], "Removed"),
    ("`kill -9` in a save", "after the manifest, before the rename"): (["SIGKILL"], "Put checkpoint-4 in its place"),
    ("`kill -9` of one of two ranks", "rank 1, as step 6 begins"): (["exit 1", "SIGKILL"], "Another process of this"),
    ("SIGTERM", "in step 5, no save due"): (["exit 143"], "SIGTERM: saved checkpoint-5, and stopped at step 5 of 6."),
    ("NaN loss in one of two ranks", "rank 1, at step 4"): (["exit 1"] * 2, "The loss of rank 1 was NaN"),
}


@pytest.fixture(scope="module")
def faults():
    """The script, as a module; and where it has trained without a fault."""
    sys.path.insert(0, str(ROOT / "trials"))
    yield importlib.import_module("faults")
    sys.path.remove(str(ROOT / "trials"))


@pytest.fixture(scope="module")
def writers(faults):
    """The script of two writers, as a module."""
    return importlib.import_module("two_writers")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize(("what", "how"), ROWS, ids=[f"{what}, {how}" for what, how in ROWS])
def test_nothing_is_lost(faults, base, what, how):
    """Resumed, a training ends with the weights, optimizer, mu and logs of one to which nothing happened."""
    fault = next(each for each in faults.FAULTS if (each.what, each.how) == (what, how))
    name = str(list(ROWS).index((what, how)))
    seen = faults.examine(fault, base, name)
    ends, said = ROWS[what, how]
    assert [faults.status(each) for each in seen.ended] == ends
    cells = faults.row(fault, seen, base / name)
    assert said in cells[2]
    assert cells[3].startswith("nothing; ") and seen.same
    assert seen.began == (5 if what == "SIGTERM" else 4 if said[:3] == "Put" or "step 6" in how else 2)


def test_the_comparison_sees_a_difference(faults, base):
    """One more bit of mu, of a weight or of a log is another outcome."""
    whole = faults.whole(base, 1)
    assert len(whole["logs"]) == 6 and len({entry["flip_ratio"] for entry in whole["logs"]}) > 3
    other = json.loads(json.dumps(whole))
    assert other == whole
    other["logs"][3]["flip_ratio"] += 1e-9
    assert other != whole


def test_the_page_has_every_row(faults):
    page = (ROOT / "docs" / "faults.md").read_text()
    for fault in faults.FAULTS:
        assert f"| {fault.what} | {fault.how} |" in page, "run: python trials/faults.py"
    assert page.startswith(faults.INTRODUCTION) and "**" not in page.removeprefix(faults.INTRODUCTION)


def test_of_two_trainings_one_writes(writers, base):
    """The second one is refused while the first one lives, which is resumed once it has been killed."""
    refused = writers.two_trainings(base, 4)
    assert refused.ends == ("killed", "refused") and refused.same


def test_a_training_that_has_been_killed_holds_no_lock(writers, base):
    """The next one begins where it was, and ends as one that was alone."""
    found = writers.two_trainings(base, 69)
    assert found == writers.Case(("killed", "finished"), None, True)


@pytest.mark.parametrize("number", [0, 1], ids=["a new folder", "an older release"])
def test_of_two_releases_one_is_whole(writers, base, number):
    """Each waits for its turn."""
    assert writers.two_releases(base, number) == ("finished", "finished")


def test_the_page_of_two_writers(writers):
    """What is in the documentation is what the script has found."""
    cases = [writers.Case(("killed", "refused"), 2, True)] * 2 + [writers.Case(("killed", "refused"), 4, False)]
    text = writers.page([*cases, writers.Case(("killed", "finished"), None, True)], [("finished", "refused")])
    assert "| killed | refused | 3 | 2 from step 2, 1 from step 4 | 1 |" in text
    assert "| killed | finished | 1 | no need | 0 |" in text
    assert "Of the 2 processes 1 wrote theirs, one after the other, and 1 were refused." in text
