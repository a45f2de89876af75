"""The one command that runs the trials."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

TRIALS = Path(__file__).parents[1] / "trials"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["trials", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TRIALS), run_name="__main__")
    return ended.value.code


def test_every_trial_is_listed():
    specification = importlib.util.spec_from_file_location("trials", TRIALS / "__main__.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    programs = {file.stem for file in TRIALS.glob("*.py") if "__main__" in file.read_text()} - {"__main__"}
    assert set(module.TRIALS) == programs


def test_an_unknown_trial_is_refused(monkeypatch, capsys):
    assert run(monkeypatch, "nonesuch") == 2
    assert "unknown trials: nonesuch; there are engines, faults, fuzz" in capsys.readouterr().err
