"""The C interface: the header in Python, and opening only those libraries that this version of proxbit can call."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

import proxbit.kernels
from proxbit.errors import ConfigError
from proxbit.kernels import interface
from proxbit.kernels.cpu import choose

LIBRARY = interface.find_library(proxbit.kernels.__path__)
HEADER = (Path(__file__).parents[2] / "src" / "proxbit" / "kernels" / "csrc" / "proxbit.h").read_text()
PLAIN = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.S)


@pytest.mark.parametrize(
    ("name", "struct"),
    [
        ("linear", interface.LinearStruct),
        ("latent", interface.LatentStruct),
        ("activations", interface.ActivationsStruct),
    ],
)
def test_structs_are_those_of_the_header(name, struct):
    """The same names in the same order, of eight bytes, floating point where it is there."""
    body = re.search(rf"struct proxbit_{name}_call {{(.*?)}};", PLAIN, re.S)[1]
    members = re.findall(r"(\w+(?: \w+)?) (\*?)(\w+);", body)
    expected = [(field, kind == "double" and not pointer) for kind, pointer, field in members]
    assert len(expected) == body.count(";")
    assert [(field, kind is ctypes.c_double) for field, kind in struct._fields_] == expected
    assert {ctypes.sizeof(kind) for _, kind in struct._fields_} == {8}


def enum(name):
    """The members of an enum, in their order, which is checked."""
    members = re.findall(r"PROXBIT_(\w+) = (\d+)", re.search(rf"enum proxbit_{name} {{(.*?)}};", PLAIN, re.S)[1])
    assert [int(number) for _, number in members] == list(range(len(members)))
    return [member for member, _ in members]


def test_enums_are_those_of_the_header():
    def spelled(names):
        return [re.sub(r"[ -]", "_", name).upper() for name in names]

    assert enum("function") == [*spelled(interface.FUNCTIONS), "FUNCTIONS"]
    assert enum("kind") == [*spelled(interface.KINDS), "KINDS"]
    assert enum("format") == ["W1", "W1A8", "W1A1", "FORMATS"] and interface.FORMATS == ("float", "int8", "sign")
    assert f"PROXBIT_PART_ROWS = {interface.PART_ROWS} " in PLAIN


def test_functions_are_those_of_the_header():
    """The same names, and as many arguments."""
    found = re.findall(r"PROXBIT_API [\w ]+[ *]proxbit_(\w+)\((.*?)\);", PLAIN, re.S)
    counts = {name: 0 if arguments == "void" else len(arguments.split(",")) for name, arguments in found}
    assert counts == {name: len(arguments) for name, (_, arguments) in interface._SIGNATURES.items()}


def test_a_library_of_another_version_is_refused(monkeypatch):
    for index in range(len(interface._NUMBERS)):
        changed = list(interface._NUMBERS)
        changed[index] += 1
        with monkeypatch.context() as patch:
            patch.setattr(interface, "_NUMBERS", changed)
            with pytest.raises(ConfigError, match="another version.*pip install"):
                interface.open_library(LIBRARY)


def test_a_library_that_lacks_a_function_is_refused(monkeypatch):
    other = next(Path(torch.__file__).parent.glob("lib/*c10*"))
    with pytest.raises(ConfigError, match="another version"):
        choose(other, {})
    assert choose(other, {"PROXBIT_ISA": "reference"}) is None
    monkeypatch.setitem(interface._SIGNATURES, "of_tomorrow", (None, []))
    with pytest.raises(ConfigError, match="another version"):
        interface.open_library(LIBRARY)
