"""The parts of `trials/stress.py`, in seconds."""

import importlib
import sys
from pathlib import Path

import pytest

from proxbit.analysis.environment import environment

TRIALS = Path(__file__).parents[1] / "trials"


@pytest.fixture
def stress(monkeypatch):
    """The script, as a module that other processes find too."""
    monkeypatch.syspath_prepend(str(TRIALS))
    yield importlib.import_module("stress")
    sys.modules.pop("stress")


def test_a_training_takes_no_more_and_no_more(stress, tmp_path):
    """300 steps, with a checkpoint every 15: after the first third no file stays open, and memory stays within 4 MB."""
    readings = stress.long_training(tmp_path, 300)
    assert [each.step for each in readings] == list(range(3, 301, 3))
    settled = readings[33:]
    assert len({each.files for each in settled}) == 1 and len({each.threads for each in settled}) == 1
    assert settled[-1].resident - settled[0].resident < 4e6
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_threads_share_packed_models(stress):
    found = stress.threads(1.5)
    assert found["different"] == 0 and found["forwards"] > stress.THREADS and len(found["models"]) == 4


def test_data_loaders_that_fork_and_that_spawn(stress):
    """With one process: a spawned one imports everything anew."""
    found = stress.loaders(3, processes=1)
    assert {context: each["same losses"] for context, each in found.items()} == dict.fromkeys(
        ("none", "fork", "spawn"), True
    )


def test_the_page(stress):
    reading = stress.Reading(0, 0.0, 600_000_000, 6, 2)
    readings = [vars(reading) | {"step": step, "seconds": float(step)} for step in range(1, 101)]
    readings[-1] |= {"resident": 603_000_000}
    found = {"seconds": 1, "models": ["A", "B"], "forwards": 1000, "different": 3}
    loaders = {"spawn": {"steps": 3, "seconds": 1.0, "same losses": False}}
    page = "\n".join(stress.page({"training": readings, "threads": found, "loaders": loaders}, environment()))
    assert "grew by 3.0 MB" in page and "| 100 | 100 | 603.0 | 6 | 2 |" in page
    assert "| 1,000 | 3 |" in page and "| spawn | 3 | 1.0 | **no** |" in page
    assert "Threads" not in "\n".join(stress.page({"loaders": loaders}, environment()))
