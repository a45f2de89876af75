"""What a user imports: names, docstrings, and what the import costs."""

import doctest
import inspect
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import proxbit
from proxbit.quantizers import PAIRS

MODULES = [info.name for info in pkgutil.walk_packages(proxbit.__path__, "proxbit.")]


def test_public_names_exist_and_are_documented():
    assert list(proxbit.__all__) == sorted(proxbit.__all__)
    for name in proxbit.__all__:
        assert inspect.getdoc(getattr(proxbit, name)), name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'binarise'"):
        proxbit.binarise  # noqa: B018


def test_a_renamed_name_still_works_and_warns():
    with pytest.warns(DeprecationWarning, match="check_scaling is now proxbit.quantizers.RowUnits"):
        check = proxbit.quantizers.check_scaling
    with pytest.raises(proxbit.ProxbitError, match="scale must be one of ls, fixed; not 'LS'"):
        check("row", "LS")
    with pytest.raises(AttributeError, match="module 'proxbit.quantizers' has no attribute 'scaling_check'"):
        proxbit.quantizers.scaling_check  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_of_every_module_has_a_docstring(name):
    module = import_module(name)
    assert module.__doc__
    for public in module.__all__ if hasattr(module, "__all__") else ():
        thing = getattr(module, public)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, f"{name}.{public}"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name):
    assert doctest.testmod(import_module(name)).failed == 0


def test_import_does_not_load_the_trainer_or_the_pictures():
    """Inference needs neither."""
    code = (
        "import sys, proxbit; "
        "names = ('matplotlib', 'datasets', 'evaluate', 'peft', 'transformers.trainer'); "
        "heavy = [m for m in names if m in sys.modules]; "
        "assert not heavy, heavy; proxbit.ProxConnectTrainer; assert 'transformers.trainer' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_readme_says_of_the_pairs():
    """The names in its table, and the answers of its session."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for kind, sound in (("sound", True), ("heuristic", False)):
        row = next(line for line in readme.splitlines() if line.startswith(f"| {kind} |"))
        names = re.findall(r"`([^`]+)`", row)
        assert names and all(PAIRS.get(name).sound == sound for name in names)
    code = readme.replace("```", "")
    session = doctest.DocTestParser().get_doctest(code, {"proxbit": proxbit}, "README", None, None)
    assert len(session.examples) == 2
    assert doctest.DocTestRunner().run(session).failed == 0


def test_what_moved_out_of_hub_is_found_there_with_a_warning():
    for name in ("binarize", "dequantize", "equalize", "fuse", "pack"):
        with pytest.warns(DeprecationWarning, match=rf"proxbit\.hub\.{name} is now proxbit\.{name}"):
            assert getattr(proxbit.hub, name) is getattr(proxbit, name)
    with pytest.warns(DeprecationWarning, match=r"is now proxbit\.plugin\.ProxbitHfQuantizer"):
        assert proxbit.hub.ProxbitHfQuantizer is proxbit.plugin.ProxbitHfQuantizer
    with pytest.raises(AttributeError, match="module 'proxbit.hub' has no attribute 'nothing'"):
        proxbit.hub.nothing  # noqa: B018
