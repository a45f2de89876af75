"""Shared by all tests: no network, one seed, one thread, real pictures."""

import os
import sys

# Tests run side by side, one to a core: before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from transformers import dynamic_module_utils
from transformers.utils import logging

from hub_server import running
from processes import Processes
from proxbit.training.sources import _asked

logging.set_verbosity_error()
logging.disable_progress_bar()


# What takes longest begins first, so that no worker is left with it at the end.
LONGEST = ("processes", "test_examples.py", "test_faults.py", "test_families.py", "test_docs_run.py", "test_resume.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of a file run in one worker, so that what they share is made once. First: xdist reads the groups."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(item.config.rootpath).as_posix()))
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    name = marker.args[0].rpartition("/")[2]
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _ask_anew() -> None:
    """What the Hub answered to a test before is not remembered."""
    _asked.cache_clear()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of the test's own, on this machine. The client of this process is led there, with an empty cache."""
    with running() as server:
        server.connect(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture(scope="session")
def processes():
    """Two processes, which call functions at the same time. Tests that use it are marked `xdist_group("processes")`."""
    started = Processes()
    yield started
    started.end()


@pytest.fixture(scope="session")
def four_processes():
    """Four of them, for groups of two."""
    started = Processes(4)
    yield started
    started.end()


@pytest.fixture(scope="session")
def photographs() -> list[np.ndarray]:
    """Two photographs, `[height, width, 3]` uint8, as they come with scikit-learn."""
    return load_sample_images().images


@pytest.fixture(scope="session")
def crops(photographs):
    """A function: `crops(n, side)` gives n different crops of the photographs, `[n, 3, side, side]` in [-1, 1]."""

    def make(count: int, side: int) -> torch.Tensor:
        generator = np.random.default_rng(0)
        pieces = []
        for i in range(count):
            picture = photographs[i % len(photographs)]
            top, left = (int(generator.integers(0, size - 2 * side)) for size in picture.shape[:2])
            pieces.append(picture[top : top + 2 * side : 2, left : left + 2 * side : 2])
        return torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2).float() / 127.5 - 1

    return make


@pytest.fixture
def copied_modules(tmp_path, monkeypatch):
    """transformers copies the code of repositories to a place of this test, and knows of none from other tests."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    forget()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield
    forget()
