"""Opening the compiled kernels: only those that this version of proxbit can call."""

from pathlib import Path

import pytest
import torch

import proxbit.kernels
from proxbit.errors import ConfigError
from proxbit.kernels import interface
from proxbit.kernels.native import choose, find_library

LIBRARY = find_library(proxbit.kernels.__path__)


@pytest.mark.parametrize("index", range(len(interface._NUMBERS)))
def test_a_library_of_another_version_is_refused(monkeypatch, index):
    changed = list(interface._NUMBERS)
    changed[index] += 1
    monkeypatch.setattr(interface, "_NUMBERS", changed)
    with pytest.raises(ConfigError, match="another version.*pip install"):
        interface.open_library(LIBRARY)


def test_a_library_that_lacks_a_function_is_refused(monkeypatch):
    other = next(Path(torch.__file__).parent.glob("lib/*c10*"))
    with pytest.raises(ConfigError, match="another version"):
        interface.open_library(other)
    with pytest.raises(ConfigError, match="another version"):
        choose(other, {})
    assert choose(other, {"PROXBIT_ISA": "reference"}) is None
    monkeypatch.setitem(interface._SIGNATURES, "of_tomorrow", (None, []))
    with pytest.raises(ConfigError, match="another version"):
        interface.open_library(LIBRARY)
