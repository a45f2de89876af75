"""`BinarizationConfig`: what it accepts, what it refuses, and that it survives JSON."""

import json
from dataclasses import fields

import pytest
import torch

import proxbit
from proxbit.config import BinarizationConfig, stored_kind
from proxbit.errors import CheckpointError, ConfigError, ProxbitError, UnknownNameError
from proxbit.quantizers import PAIRS, Function, catalog, get_pair

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
    "empty lists": dict(include=[], modules_to_not_convert=[], learned_attention=[]),
    "learned attention": dict(learned_attention=["vit.layers.*.attention"]),
    "raw form": dict(weights="pc", normalize="none", scale="fixed"),
    "packed": dict(weights="bnn", normalize="tensor", state="packed"),
    "centred": dict(weights="bnn++", normalize="std", center="remove"),
    "levels": dict(weights="pc", pair_parameters={"levels": [-1, 0, 1], "rho": 0.5}),
}

INVALID = [
    (dict(normalize="rows"), ConfigError, "normalize must be one of row, tensor, std, none; not 'rows'"),
    (dict(normalize=""), ConfigError, "normalize must be one of .*; not ''"),
    (dict(center="mean"), ConfigError, "center must be one of none, remove, restore; not 'mean'"),
    (
        dict(weights="pc", pair_parameters={"level": [-1, 1]}),
        ConfigError,
        r"cannot take .*'level'.*signature: pc\(levels",
    ),
    (dict(weights="pc", pair_parameters={"levels": [1, -1]}), ConfigError, "levels must be two or more increasing"),
    (dict(weights="pc", pair_parameters={"rho": {1}}), ConfigError, "must be JSON types"),
    (dict(weights="pc", pair_parameters=[1]), ConfigError, "parameters"),
    (dict(weights="bc", pair_parameters={"rho": 1}), ConfigError, "'bc' takes no parameters"),
    (dict(weights=get_pair("pc"), pair_parameters={"rho": 1}), ConfigError, "has its own already"),
    (dict(scale="mean"), ConfigError, "scale must be one of ls, fixed; not 'mean'"),
    (dict(state="float"), ConfigError, "state must be one of latent, packed; not 'float'"),
    (dict(quant_method="gptq"), ConfigError, "quant_method must be 'proxbit', not 'gptq'"),
    (dict(include="vit.layers.*"), ConfigError, "include must be a list of patterns, such as"),
    (dict(include=[1]), ConfigError, r"include must be a list of patterns.* not \[1\]"),
    (dict(include=5), ConfigError, "include must be a list of patterns.* not 5"),
    (dict(modules_to_not_convert="a"), ConfigError, "modules_to_not_convert must be a list"),
    (dict(modules_to_not_convert=True), ConfigError, "modules_to_not_convert must be a list"),
    (dict(learned_attention=True), ConfigError, "learned_attention must be a list of patterns"),
    (dict(format_version=0), CheckpointError, "format_version must be a whole number from 1 on"),
    (dict(format_version=True), CheckpointError, "format_version must be a whole number .* not True"),
    (dict(format_version="1"), CheckpointError, "format_version must be a whole number .* not '1'"),
    (dict(format_version=2), CheckpointError, "format_version 2; this proxbit reads up to 1.*pip"),
    (dict(weights="nothing"), UnknownNameError, "Unknown quantizer pair 'nothing'"),
    (dict(weights=None), ConfigError, r"weights must be .* such as 'bnn\+\+'; not None. Valid: .*parq"),
    (dict(weights=None, state="packed"), ConfigError, "weights must be .*; not None. Valid: .*parq"),
    (dict(weights=["bnn++"]), ConfigError, r"weights must be .*; not \['bnn\+\+'\]. Valid: .*parq"),
]


@pytest.fixture
def own_pair(monkeypatch):
    """A pair that is not registered; whatever the test registers is forgotten after it."""
    for owner, name in ((PAIRS, "_entries"), (catalog, "_FACTORIES"), (catalog, "_MADE")):
        monkeypatch.setattr(owner, name, dict(getattr(owner, name)))
    halving = Function("half", lambda w, mu: w / 2, "w / 2", "the proximal map of w^2 / 2")
    return proxbit.compose(halving)


@pytest.mark.parametrize("item", fields(BinarizationConfig), ids=lambda item: item.name)
def test_every_field_says_what_it_does(item):
    text = item.metadata.get("help", "")
    assert len(text.split()) >= 2
    assert text.endswith(".")


NAMES = [f"{number}-{list(row[0])[-1]}" for number, row in enumerate(INVALID)]


@pytest.mark.parametrize(("changes", "error", "message"), INVALID, ids=NAMES)
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
    listed = str(caught.value).split("Valid: ")[1].split(". ")[0].split(", ")
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


def shrink(strength=0.5):
    return proxbit.compose(lambda w, mu: w * strength, scaling=("none", "fixed", "remove"))


def test_a_function_of_parameters_is_stored_by_name_and_parameters(own_pair):
    """Whether it is asked for by name, or given as the pair it returned."""
    proxbit.register_pair("shrink", shrink)
    config = BinarizationConfig(weights="shrink", pair_parameters={"strength": 0.25})
    assert (config.normalize, config.scale, config.center) == ("none", "fixed", "remove")
    stored = json.loads(json.dumps(config.to_dict()))
    assert (stored["weights"], stored["pair_parameters"]) == ("shrink", {"strength": 0.25})
    again = BinarizationConfig.from_dict(stored)
    assert again.quantizer_pair() is config.quantizer_pair()
    assert again.quantizer_pair().forward(torch.tensor([8.0]), 1.0).tolist() == [2.0]
    assert BinarizationConfig(weights=config.quantizer_pair()) == config
    assert BinarizationConfig(weights="shrink").pair_parameters is None
    assert BinarizationConfig(weights="shrink", pair_parameters={}) == BinarizationConfig(weights=get_pair("shrink"))


@pytest.mark.parametrize("parameters", [None, {"strength": 0.25}], ids=["plain", "parameters"])
def test_a_pair_that_is_registered_elsewhere(parameters):
    """A packed model does not need it: it holds signs. A latent one does, and the error says what to do."""
    packed = BinarizationConfig(weights="shrink", pair_parameters=parameters, state="packed", center="restore")
    assert (packed.weights, packed.pair_parameters, packed.center) == ("shrink", parameters, "restore")
    assert packed.quantizer_pair() is get_pair("bc")
    message = r"Unknown quantizer pair 'shrink'.*proxbit\.register_pair\('shrink', pair\)"
    with pytest.raises(UnknownNameError, match=message):
        BinarizationConfig(weights="shrink", pair_parameters=parameters)
    with pytest.raises(UnknownNameError, match=message):
        packed.replace(state="latent")


@pytest.mark.parametrize("name", ["bnn++", "adabin", "pc"])
def test_a_packed_model_computes_with_signs(name):
    """Whichever pair trained it, and whatever is registered under that name here; its row units stay."""
    latent = BinarizationConfig(weights=name)
    packed = latent.replace(state="packed")
    assert packed.quantizer_pair() is get_pair("bc")
    assert packed == BinarizationConfig(weights=name, state="packed")
    assert packed.to_dict() == latent.to_dict() | {"state": "packed"}


def test_a_packed_file_loads_where_its_name_means_another_pair(own_pair):
    """One that does not take the parameters of the file. A latent model needs the pair it was trained with."""
    trained = BinarizationConfig(weights="shrink", pair_parameters={"strength": 0.25}, state="packed", scale="fixed")
    proxbit.register_pair("shrink", own_pair)
    packed = BinarizationConfig.from_dict(trained.to_dict())
    assert packed == trained
    assert packed.quantizer_pair() is get_pair("bc")
    with pytest.raises(ConfigError, match="takes no parameters"):
        packed.replace(state="latent")


@pytest.mark.parametrize(
    ("pair", "units"),
    [
        ("bnn++", ("row", "ls", "none")),
        ("dorefa", ("tensor", "fixed", "none")),
        ("xnor", ("none", "ls", "remove")),
        ("adabin", ("std", "fixed", "restore")),
    ],
)
def test_row_units_are_those_of_the_pair_unless_given(pair, units):
    """Resolved when the configuration is made: what is stored does not depend on the table of pairs."""
    stored = BinarizationConfig(weights=pair).to_dict()
    assert (stored["normalize"], stored["scale"], stored["center"]) == units
    given = BinarizationConfig(weights=pair, normalize="tensor", scale="ls", center="remove")
    assert (given.normalize, given.scale, given.center) == ("tensor", "ls", "remove")
    partly = BinarizationConfig(weights=pair, center="none")
    assert (partly.normalize, partly.scale, partly.center) == (*units[:2], "none")
    assert given.replace(center=None).center == units[2]


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
    patterns, parameters = ["a.*"], {"levels": [-1, 0, 1]}
    config = BinarizationConfig(include=patterns, weights="pc", pair_parameters=parameters)
    patterns.append("b")
    parameters["levels"].append(2)
    config.to_dict()["include"].append("c")
    config.to_dict()["pair_parameters"]["levels"].append(3)
    assert (config.include, config.pair_parameters) == (["a.*"], {"levels": [-1, 0, 1]})


def test_patterns_may_come_as_a_tuple():
    assert BinarizationConfig(include=("a", "b")) == BinarizationConfig(include=["a", "b"])


def test_levels_may_come_as_a_tuple():
    """What is stored is JSON: the configuration that is read again is the same."""
    config = BinarizationConfig(weights="pc", pair_parameters={"levels": (-1, 0, 1)})
    assert BinarizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_replace_leaves_the_original():
    config = BinarizationConfig()
    assert config.replace(weights="bc").weights == "bc"
    assert config == BinarizationConfig()


def test_another_pair_brings_its_own_units():
    """Those of the old pair do not stick to it, nor do its parameters; what is given in the same call stays."""
    ternary = BinarizationConfig(weights="pc", pair_parameters={"levels": [-1, 0, 1]}, include=["a"])
    assert ternary.replace(weights="xnor") == BinarizationConfig(weights="xnor", include=["a"])
    assert ternary.replace(weights=get_pair("xnor")) == BinarizationConfig(weights="xnor", include=["a"])
    adabin = BinarizationConfig(weights="adabin")
    assert adabin.replace(weights="bc") == BinarizationConfig(weights="bc")
    given = dict(weights="pc", scale="fixed", pair_parameters={"rho": 0.5})
    assert adabin.replace(**given) == BinarizationConfig(**given)


def test_the_same_pair_keeps_what_was_chosen():
    config = BinarizationConfig(weights="pc", scale="fixed", pair_parameters={"rho": 0.5})
    assert config.replace(weights="pc", include=["a"]) == BinarizationConfig(
        weights="pc", scale="fixed", pair_parameters={"rho": 0.5}, include=["a"]
    )
    assert config.replace(state="packed").scale == "fixed"
    pair = get_pair("pc", {"rho": 0.5})
    assert config.replace(weights=pair) == config
    assert BinarizationConfig(scale="fixed").replace(weights=get_pair("bnn++")).scale == "fixed"


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


@pytest.mark.parametrize(
    "stored, kind",
    [
        (None, ("float", None)),
        ({}, ("float", None)),
        ({"quant_method": "gptq", "state": "packed"}, ("gptq", None)),
        (BinarizationConfig(state="packed").to_dict(), ("proxbit", "packed")),
    ],
)
def test_what_a_stored_configuration_makes_of_a_model(stored, kind):
    assert stored_kind(stored, "config.json") == kind


def test_a_stored_configuration_that_is_none_is_damage():
    with pytest.raises(CheckpointError, match="quantization_config of tiny/vit is damaged: 'w1a8'"):
        stored_kind("w1a8", "tiny/vit")


@pytest.mark.parametrize("field", ["include", "modules_to_not_convert", "learned_attention", "overrides"])
def test_patterns_have_a_length(field):
    pattern = "*" * 10**6
    for value in ({pattern: {}}, {pattern: 3}) if field == "overrides" else ([pattern], [pattern, 3]):
        with pytest.raises(ConfigError) as caught:
            BinarizationConfig(**{field: value})
        assert len(str(caught.value)) < 600
    BinarizationConfig(**{field: {"x" * 255: {}} if field == "overrides" else ["x" * 255]})


def test_fields_are_read_as_those_of_a_dict():
    config = BinarizationConfig(activations="int8")
    assert (config.get("activations"), config.get("load_in_8bit"), config.get("nothing", 3)) == ("int8", None, 3)
