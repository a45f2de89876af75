"""The registry: duplicates are refused, unknown names are explained."""

import pytest

from proxbit.errors import ProxbitError, UnknownNameError
from proxbit.registry import Registry


@pytest.fixture
def tools():
    registry = Registry("tool")
    for name in ("hammer", "screwdriver", "saw"):
        registry.register(name, name.upper())
    return registry


def test_entries_come_back_by_name(tools):
    assert tools.get("hammer") == "HAMMER"
    assert "saw" in tools
    assert "drill" not in tools
    assert len(tools) == 3
    assert list(tools) == ["hammer", "screwdriver", "saw"]


def test_register_returns_the_entry_itself():
    entry = object()
    registry = Registry("tool")
    assert registry.register("it", entry) is entry
    assert registry.get("it") is entry


def test_registries_are_independent(tools):
    assert len(Registry("tool")) == 0


def test_taken_name_is_refused_and_keeps_its_entry(tools):
    with pytest.raises(UnknownNameError, match="The tool 'saw' is already registered; choose another name"):
        tools.register("saw", "another saw")
    assert tools.get("saw") == "SAW"


def test_empty_name_is_refused(tools):
    with pytest.raises(UnknownNameError, match="A tool needs a name that is not empty"):
        tools.register("", "nothing")
    assert len(tools) == 3


@pytest.mark.parametrize(
    ("wrong", "meant"), [("hamer", "hammer"), ("screw-driver", "screwdriver"), ("Saw", "saw")], ids=lambda name: name
)
def test_unknown_name_names_the_nearest_and_all_valid_ones(tools, wrong, meant):
    with pytest.raises(UnknownNameError) as caught:
        tools.get(wrong)
    message = str(caught.value)
    assert f"Unknown tool {wrong!r}. Did you mean {meant!r}?" in message
    assert message.endswith("Valid: hammer, saw, screwdriver.")


def test_several_near_misses_are_all_named():
    registry = Registry("pair")
    for name in ("bnn", "bnn+", "bnn++", "parq"):
        registry.register(name, name)
    with pytest.raises(UnknownNameError, match="Did you mean") as caught:
        registry.get("bnn+++")
    question = str(caught.value).split("?")[0]
    assert "'bnn++' or 'bnn+'" in question
    assert "parq" not in question


def test_nothing_near_gives_no_hint(tools):
    with pytest.raises(UnknownNameError, match=r"^Unknown tool 'xyz'\. Valid: hammer, saw, screwdriver\.$"):
        tools.get("xyz")


def test_the_error_is_a_value_error_of_the_project(tools):
    with pytest.raises(ValueError, match="Unknown tool") as caught:
        tools.get("xyz")
    assert isinstance(caught.value, ProxbitError)
