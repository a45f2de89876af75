"""What a program says it runs on."""

import dataclasses

import pytest
import torch

from proxbit.analysis.environment import cpu_model, environment
from proxbit.errors import ConfigError
from proxbit.kernels import native


@pytest.fixture
def _fresh_choice():
    """The level is chosen once a process: anew before and after the test."""
    native.cache_clear()
    yield
    native.cache_clear()


def test_it_names_versions_processor_and_kernels():
    here = environment()
    assert here.versions["torch"] == torch.__version__
    assert set(here.versions) == {"proxbit", "torch", "transformers", "python"}
    assert here.cpu and here.cores >= 1 and here.threads == torch.get_num_threads()
    assert here.level == ("reference" if native() is None else native().name)
    assert here.cpu in str(here) and here.level in str(here)


@pytest.mark.usefixtures("_fresh_choice")
def test_the_forced_reference_comes_with_advice(monkeypatch):
    monkeypatch.setenv("PROXBIT_ISA", "reference")
    here = environment()
    assert (here.level, here.isa) == ("reference", "reference")
    assert "slow" in here.advice
    assert ("PROXBIT_ISA" in here.advice) == (here.library is not None)


@pytest.mark.usefixtures("_fresh_choice")
def test_a_level_that_does_not_run_is_refused(monkeypatch):
    monkeypatch.setenv("PROXBIT_ISA", "abacus")
    with pytest.raises(ConfigError, match="'abacus'"):
        environment()


def test_advice_is_for_the_reference_only():
    here = environment()
    assert dataclasses.replace(here, level="avx2").advice is None
    assert "compiler" in dataclasses.replace(here, level="reference", library=None).advice


def test_the_processor_is_read_from_the_system(tmp_path):
    information = tmp_path / "cpuinfo"
    information.write_text("processor\t: 0\nmodel name\t: Abacus 3000 @ 1 Hz: fast\nmodel name\t: other\n")
    assert cpu_model(information) == "Abacus 3000 @ 1 Hz: fast"
    information.write_text("processor : 0\n")
    assert cpu_model(information) == cpu_model(tmp_path / "missing")
