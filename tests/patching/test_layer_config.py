"""From a configuration to the options of each layer, and from the layers back to a configuration that makes them."""

import copy
import random
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import proxbit
from families import TABLE
from proxbit.config import BinarizationConfig
from proxbit.errors import ConfigError, ModelStateError, PatternError, UnknownNameError
from proxbit.nn import BinaryLinear
from proxbit.patching import config_of, to_latent, to_packed
from proxbit.patching.layer_config import reads_one_sign
from tiny_models import FAMILIES

FIELDS = [
    {"activations": "int8"},
    {"activations": "sign", "rprelu": True},
    {"activations": "int4", "accumulator_bits": 9, "accumulator_mode": "wrap"},
    {"rprelu": False, "activations": "int8"},
]


def layers(model):
    """What is said of each latent layer."""
    return {name: repr(module) for name, module in model.named_modules() if isinstance(module, BinaryLinear)}


@pytest.mark.parametrize(("family", "seed"), [("vit", 0), ("clip", 1), ("swin", 2), ("deit", 0), ("segformer", 1)])
def test_a_part_is_the_same_as_in_the_whole(family, seed):
    whole, alone = nn.ModuleDict({"net": FAMILIES[family](), "other": nn.Linear(4, 4)}), FAMILIES[family]()
    names = [name for name, module in whole.named_modules() if type(module) is nn.Linear]
    choice = random.Random(seed)
    chosen = [name for name in names if choice.random() < 0.7]
    patterns = ["*", *chosen[:3], *(f"*.{name.rpartition('.')[2]}" for name in choice.sample(chosen, 3))]
    overrides = {pattern: choice.choice(FIELDS) for pattern in patterns}
    _, resolved = to_latent(whole, BinarizationConfig(include=chosen, overrides=overrides))
    part = config_of(whole["net"])
    found, stored = to_latent(alone, part)
    assert layers(alone) == layers(whole["net"]) != {}
    assert set(found.converted) == {name.removeprefix("net.") for name in chosen if name.startswith("net.")}
    assert stored == part == config_of(alone)
    assert config_of(whole) is resolved


@pytest.mark.parametrize("family", ["segformer", "resnet"])
def test_a_whole_is_the_same_as_its_parts(family):
    """Of layers of several configurations, of which one asks for more where it fits only."""
    parts = nn.ModuleDict({"a": FAMILIES[family](), "b": FAMILIES[family](), "c": FAMILIES[family]()})
    to_latent(parts["a"], BinarizationConfig(activations="sign"))
    to_latent(parts["b"], BinarizationConfig(residual=True, rprelu=True, accumulator_bits=9))
    again = nn.ModuleDict({name: FAMILIES[family]() for name in parts})
    to_latent(again, config_of(parts))
    assert layers(again) == layers(parts)
    assert {name for name in layers(parts) if name.startswith("c.")} == set()


def test_learned_attention_goes_by_the_names_of_the_part():
    model = nn.ModuleDict({"a": FAMILIES["vit"](), "b": FAMILIES["vit"]()})
    patterns = ["a.vit.layers.1.attention", "b.vit.layers.*.attention"]
    to_latent(model, BinarizationConfig(learned_attention=patterns))
    assert config_of(model["a"]).learned_attention == ["vit.layers.1.attention"]
    assert config_of(model["b"]).learned_attention == ["vit.layers.*.attention"]


def test_a_float_model_has_none_and_a_copy_has_its_own():
    model = FAMILIES["vit"]()
    assert config_of(model) is None
    to_latent(model, BinarizationConfig(activations="int8"))
    copied = copy.deepcopy(model)
    to_packed(model)
    assert (config_of(copied).state, config_of(model).state) == ("latent", "packed")
    assert config_of(copied).replace(state="packed") == config_of(model)


def test_one_configuration_for_two_pairs_is_refused_until_they_are_bits():
    model = nn.ModuleDict({"a": FAMILIES["vit"](), "b": FAMILIES["vit"]()})
    to_latent(model["a"], BinarizationConfig())
    to_latent(model["b"], BinarizationConfig(weights="bc"))
    with pytest.raises(ModelStateError, match="a.vit.layers.0.* and b.vit.layers.0.* with other pairs"):
        config_of(model)
    to_packed(model["b"])
    with pytest.raises(ModelStateError, match="some packed"):
        config_of(model)
    to_packed(model["a"])
    assert config_of(model).state == "packed"


def test_layers_of_a_wrapper_that_adds_to_their_names_keep_those_of_their_tensors():
    model = FAMILIES["vit"]()
    _, resolved = to_latent(model, BinarizationConfig())
    layer = model.vit.layers[0]
    model.vit.layers[0] = checkpoint_wrapper(layer)
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
    assert config_of(model) is resolved


def options_of(model):
    return {
        name: (layer.activations, layer.rprelu is not None, layer.epilogue.residual)
        for name, layer in model.named_modules()
        if isinstance(layer, BinaryLinear)
    }


def binarized(family="vit", **options):
    return proxbit.binarize(FAMILIES[family](), BinarizationConfig(**options))


@pytest.mark.parametrize("family", TABLE)
def test_inputs_of_one_sign_are_found_by_name(family, crops):
    """Every layer that is binarized and reads the output of a GELU or ReLU, and no other, on the real models."""
    # In training mode, so that batch normalization keeps numbers of order 1 on the way.
    row, model, read = TABLE[family], FAMILIES[family]().train(), {}

    def hook(name):
        return lambda module, arguments: read.setdefault(name, []).append(arguments[0])

    for name, module in model.named_modules():
        if type(module) is nn.Linear and any(fnmatchcase(name, pattern) for pattern in row.binarized):
            module.register_forward_pre_hook(hook(name))
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.3)
    with torch.no_grad():
        model(**row.inputs(crops(4, row.side)))
    for name, inputs in read.items():
        values = torch.cat([tensor.flatten() for tensor in inputs])
        if not any(fnmatchcase(name, pattern) for pattern in row.still):
            assert reads_one_sign(model, name) == bool(-values.min() < 0.5 * values.max()), (name, values.aminmax())


def test_a_gated_block_is_two_signed():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.fc2 = nn.Linear(2, 2), nn.Linear(2, 2)

    assert not reads_one_sign(nn.ModuleDict({"mlp": Gated()}), "mlp.fc2")


@pytest.mark.parametrize(("activations", "other"), [("sign", "elastic"), ("int4", "uint4"), ("int8", "int8")])
def test_the_layer_behind_gelu_has_a_format_of_its_own(activations, other):
    model = binarized(activations=activations)
    found = options_of(model)
    assert {v[0] for n, v in found.items() if n.endswith("fc2")} == {other}
    assert {v[0] for n, v in found.items() if not n.endswith("fc2")} == {activations}
    stored = model.config.quantization_config.overrides
    assert stored == (None if other == activations else {"vit.layers.*.mlp.fc2": {"activations": other}})


def test_overrides():
    model = binarized(
        activations="sign",
        rprelu=True,
        residual=True,
        overrides={
            "vit.layers.0": {"activations": "int8"},
            "*.mlp.*": {"rprelu": False},
            "*.1.mlp.fc2": {"activations": "sign"},
        },
    )
    found = options_of(model)
    assert found["vit.layers.0.mlp.fc2"] == ("int8", False, False)
    assert found["vit.layers.0.attention.q_proj"] == ("int8", True, True)
    assert found["vit.layers.1.mlp.fc1"] == ("sign", False, False)
    assert found["vit.layers.1.mlp.fc2"] == ("sign", False, False)
    again = proxbit.binarize(FAMILIES["vit"](), model.config.quantization_config.replace(state="latent"))
    assert options_of(again) == found


def test_what_is_given_comes_after_what_a_one_signed_input_gets():
    """Also where both name the same layers by the same pattern."""
    given = {"vit.layers.0.*": {"activations": "int8"}, "vit.layers.*.mlp.fc2": {"activations": "sign"}}
    model = binarized(activations="sign", overrides=given)
    assert options_of(model)["vit.layers.0.mlp.fc2"][0] == "sign"
    assert list(model.config.quantization_config.overrides) == list(given)


@pytest.mark.parametrize("swapped", [False, True], ids=["as sorted", "against it"])
def test_the_order_of_overrides_is_stored(swapped, tmp_path):
    """transformers sorts the keys of a config.json."""
    given = {"*.o_proj": {"residual": True, "activations": "float"}, "vit.layers.*": {"activations": "int8"}}
    given = dict(reversed(given.items())) if swapped else given
    model = binarized(overrides=given)
    for each in (model, proxbit.pack(model)):
        each.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert options_of(again) == options_of(model)
        assert list(again.config.quantization_config.overrides.items()) == list(given.items())


def test_pairs_of_activations():
    model = binarized(activations="sign", activation_pair="ede", overrides={"*.fc1": {"activation_pair": "bnn++"}})
    pairs = {name: layer.activation.pair for name, layer in model.named_modules() if isinstance(layer, BinaryLinear)}
    assert pairs["vit.layers.0.mlp.fc1"].sound
    assert not pairs["vit.layers.0.attention.q_proj"].sound


REFUSED = [
    ({"overrides": {"*.fc3": {}}}, PatternError, r"overrides: the pattern '\*.fc3' matches no module"),
    ({"overrides": {"*.classifier": {}}}, PatternError, "overrides: the pattern"),
    (
        {"overrides": {"classifier": {}}},
        PatternError,
        r"'classifier' matches no linear layer that is binarized, but classifier \(head\)",
    ),
    ({"overrides": ["*.fc2"]}, ConfigError, "overrides must be a dict of patterns"),
    ({"overrides": [["a", {}], ["a", {}]]}, ConfigError, "overrides must be a dict of patterns"),
    (
        {"overrides": {"*.fc2": {"bits": 4}}},
        ConfigError,
        "fields of activations, activation_pair, rprelu, residual",
    ),
    ({"overrides": {"*.fc2": {"activations": "int3"}}}, ConfigError, "activations must be one of"),
    (
        {"overrides": {"*.fc2": {"residual": True}}},
        ConfigError,
        r"^vit\.layers\.0\.mlp\.fc2: .* as many outputs as inputs",
    ),
    ({"overrides": {"*.fc2": {"rprelu": 1}}}, ConfigError, r"overrides\['\*.fc2'\]: rprelu must be True or False"),
    ({"rprelu": None}, ConfigError, "rprelu must be True or False, not None"),
    ({"activation_pair": "nobody"}, UnknownNameError, "Unknown quantizer pair 'nobody'"),
    ({"activation_pair": 3}, ConfigError, "activation_pair must be a name, not 3"),
    ({"activation_pair": "fp"}, ConfigError, "must be a pair with the levels"),
]


def test_what_is_refused():
    model = FAMILIES["vit"]()
    for options, error, words in REFUSED:
        with pytest.raises(error, match=words):
            proxbit.binarize(model, BinarizationConfig(**options))
    assert type(model.vit.layers[0].mlp.fc1) is nn.Linear


def test_none_is_float():
    assert BinarizationConfig(activations=None).activations == "float"
