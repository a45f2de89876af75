"""`BinarizationConfig`: what it accepts, what it refuses, and that it survives JSON."""

import json
from dataclasses import fields

import pytest
import torch

import proxbit
from proxbit.config import BinarizationConfig
from proxbit.errors import CheckpointError, ConfigError, ProxbitError, UnknownNameError
from proxbit.quantizers import PAIRS, ProximalMap, get_pair

VERSION_1 = """
{
  "format_version": 1,
  "include": ["vit.layers.*.mlp.fc1", "vit.layers.*.mlp.fc2"],
  "modules_to_not_convert": null,
  "normalize": "tensor",
  "quant_method": "proxbit",
  "scale": "fixed",
  "state": "packed",
  "weights": "parq"
}
"""

CHANGES = {
    "defaults": {},
    "patterns": dict(include=["vit.layers.*", "*.fc1"], modules_to_not_convert=["vit.layers.0"]),
    "empty lists": dict(include=[], modules_to_not_convert=[]),
    "raw form": dict(weights="pc", normalize="none", scale="fixed"),
    "packed": dict(weights="bnn", normalize="tensor", state="packed"),
}

INVALID = [
    (dict(normalize="rows"), ConfigError, "normalize must be one of row, tensor, none; not 'rows'"),
    (dict(normalize=None), ConfigError, "normalize must be one of .*; not None"),
    (dict(scale="mean"), ConfigError, "scale must be one of ls, fixed; not 'mean'"),
    (dict(state="float"), ConfigError, "state must be one of latent, packed; not 'float'"),
    (dict(quant_method="gptq"), ConfigError, "quant_method must be 'proxbit', not 'gptq'"),
    (dict(include="vit.layers.*"), ConfigError, "include must be a list of patterns, such as"),
    (dict(include=[1]), ConfigError, r"include must be a list of patterns.* not \[1\]"),
    (dict(include=5), ConfigError, "include must be a list of patterns.* not 5"),
    (dict(modules_to_not_convert="a"), ConfigError, "modules_to_not_convert must be a list"),
    (dict(modules_to_not_convert=True), ConfigError, "modules_to_not_convert must be a list"),
    (dict(format_version=0), CheckpointError, "format_version must be a whole number from 1 on"),
    (dict(format_version="1"), CheckpointError, "format_version must be a whole number .* not '1'"),
    (dict(format_version=2), CheckpointError, "format_version 2; this proxbit reads up to 1.*pip"),
    (dict(weights="nothing"), UnknownNameError, "Unknown quantizer pair 'nothing'"),
    (dict(weights=None), UnknownNameError, "Unknown quantizer pair"),
]


@pytest.fixture
def own_pair(monkeypatch):
    """A pair that is not registered; whatever the test registers is forgotten after it."""
    monkeypatch.setattr(PAIRS, "_entries", dict(PAIRS._entries))
    halving = ProximalMap("half", lambda w, mu: w / 2, "P(w) = w / 2", "the proximal map of w^2 / 2")
    return proxbit.compose(halving)


@pytest.mark.parametrize("item", fields(BinarizationConfig), ids=lambda item: item.name)
def test_every_field_says_what_it_does(item):
    text = item.metadata.get("help", "")
    assert len(text.split()) >= 2
    assert text.endswith(".")


@pytest.mark.parametrize(("changes", "error", "message"), INVALID, ids=[str(row[0]) for row in INVALID])
def test_values_that_cannot_work(changes, error, message):
    """Each is refused by the constructor, and by `replace`; every error is a ProxbitError and so a ValueError."""
    with pytest.raises(error, match=message):
        BinarizationConfig(**changes)
    with pytest.raises(error, match=message):
        BinarizationConfig().replace(**changes)
    assert issubclass(error, ProxbitError)
    assert issubclass(error, ValueError)


def test_an_unknown_pair_lists_the_valid_names():
    with pytest.raises(UnknownNameError, match="Did you mean 'binaryrelax'") as caught:
        BinarizationConfig(weights="binary_relax")
    listed = str(caught.value).split("Valid: ")[1].rstrip(".").split(", ")
    assert set(listed) == set(PAIRS)
    assert {"bc", "pc", "binaryrelax", "parq", "bnn", "bnn+", "bnn++"} <= set(listed)


def test_a_registered_pair_is_stored_by_name(own_pair):
    proxbit.register_pair("half", own_pair)
    config = BinarizationConfig(weights=own_pair)
    assert config.weights == "half"
    assert json.loads(json.dumps(config.to_dict()))["weights"] == "half"
    assert get_pair(config.weights) is own_pair
    assert BinarizationConfig(weights=get_pair("bnn++")).weights == "bnn++"


def test_a_registered_pair_is_what_the_layers_compute_with(own_pair):
    proxbit.register_pair("half", own_pair)
    model = proxbit.binarize(torch.nn.Sequential(torch.nn.Linear(4, 2)), BinarizationConfig(weights=own_pair))
    assert model[0].pair is own_pair


def test_an_unregistered_pair_is_refused(own_pair):
    with pytest.raises(UnknownNameError, match=r"has no name.*proxbit\.register_pair\('a-name', pair\)"):
        BinarizationConfig(weights=own_pair)


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_round_trip_through_json(changes):
    config = BinarizationConfig(**changes)
    stored = json.loads(json.dumps(config.to_dict()))
    assert set(stored) == {item.name for item in fields(BinarizationConfig)}
    assert {name: stored[name] for name in changes} == changes
    again = BinarizationConfig.from_dict(stored)
    assert again == config
    assert again.to_json_string() == config.to_json_string()


def test_a_dict_of_a_configuration_shares_nothing_with_it():
    patterns = ["a.*"]
    config = BinarizationConfig(include=patterns)
    patterns.append("b")
    config.to_dict()["include"].append("c")
    assert config.include == ["a.*"]


def test_patterns_may_come_as_a_tuple():
    assert BinarizationConfig(include=("a", "b")) == BinarizationConfig(include=["a", "b"])


def test_replace_leaves_the_original():
    config = BinarizationConfig()
    assert config.replace(weights="bc").weights == "bc"
    assert config == BinarizationConfig()


def test_unknown_fields_are_refused():
    with pytest.raises(ConfigError, match=r"Unknown fields \['bits', 'weight'\].*Valid: .*'weights'"):
        BinarizationConfig.from_dict({"weight": "bnn++", "bits": 1})


@pytest.mark.parametrize("extra", [{}, {"activations": "sign"}], ids=["known fields", "fields of the future"])
def test_a_newer_format_asks_for_an_upgrade(extra):
    """Also when the newer version has fields that this one does not know."""
    stored = BinarizationConfig().to_dict() | {"format_version": 2} | extra
    with pytest.raises(CheckpointError, match="format_version 2; this proxbit reads up to 1.*pip install --upgrade"):
        BinarizationConfig.from_dict(stored)


def test_from_dict_sorts_keyword_arguments():
    """Those that are fields change the configuration, the others come back."""
    arguments = dict(scale="fixed", colour=1)
    config, unused = BinarizationConfig.from_dict({"weights": "bc"}, return_unused_kwargs=True, **arguments)
    assert (config.weights, config.scale, unused) == ("bc", "fixed", {"colour": 1})
    assert BinarizationConfig.from_dict({"weights": "bc"}, scale="fixed") == config


@pytest.mark.parametrize("change", [{"weights": "nothing"}, {"scale": "mean"}, {"include": "a"}], ids=str)
def test_from_dict_checks_keyword_arguments(change):
    with pytest.raises(ProxbitError, match="Unknown quantizer pair|must be"):
        BinarizationConfig.from_dict({}, **change)


def test_format_version_1_stays_loadable():
    config = BinarizationConfig.from_dict(json.loads(VERSION_1))
    assert config == BinarizationConfig(
        weights="parq",
        include=["vit.layers.*.mlp.fc1", "vit.layers.*.mlp.fc2"],
        normalize="tensor",
        scale="fixed",
        state="packed",
    )
