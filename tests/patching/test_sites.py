"""What is around each layer: the choice for all, overrides, and formats for inputs of one sign."""

from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

import proxbit
from families import TABLE
from proxbit.errors import ConfigError, PatternError, UnknownNameError
from proxbit.nn import BinaryLinear
from proxbit.patching.sites import reads_one_sign
from tiny_models import FAMILIES


def sites(model):
    return {
        name: (layer.activations, layer.rprelu is not None, layer.residual)
        for name, layer in model.named_modules()
        if isinstance(layer, BinaryLinear)
    }


def binarized(family="vit", **options):
    return proxbit.binarize(FAMILIES[family](), proxbit.BinarizationConfig(**options))


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
    found = sites(model)
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
    found = sites(model)
    assert found["vit.layers.0.mlp.fc2"] == ("int8", False, False)
    assert found["vit.layers.0.attention.q_proj"] == ("int8", True, True)
    assert found["vit.layers.1.mlp.fc1"] == ("sign", False, False)
    assert found["vit.layers.1.mlp.fc2"] == ("sign", False, False)
    again = proxbit.binarize(FAMILIES["vit"](), model.config.quantization_config.replace(state="latent"))
    assert sites(again) == found


def test_what_is_given_comes_after_what_a_one_signed_input_gets():
    """Also where both name the same layers by the same pattern."""
    given = {"vit.layers.0.*": {"activations": "int8"}, "vit.layers.*.mlp.fc2": {"activations": "sign"}}
    model = binarized(activations="sign", overrides=given)
    assert sites(model)["vit.layers.0.mlp.fc2"][0] == "sign"
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
        assert sites(again) == sites(model)
        assert list(again.config.quantization_config.overrides.items()) == list(given.items())


def test_pairs_of_activations():
    model = binarized(activations="sign", activation_pair="ede", overrides={"*.fc1": {"activation_pair": "bnn++"}})
    pairs = {name: layer.activation.pair for name, layer in model.named_modules() if isinstance(layer, BinaryLinear)}
    assert pairs["vit.layers.0.mlp.fc1"].sound
    assert not pairs["vit.layers.0.attention.q_proj"].sound


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
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
    ],
    ids=str,
)
def test_what_is_refused(options, error, words):
    model = FAMILIES["vit"]()
    with pytest.raises(error, match=words):
        proxbit.binarize(model, proxbit.BinarizationConfig(**options))
    assert type(model.vit.layers[0].mlp.fc1) is nn.Linear


def test_none_is_float():
    assert proxbit.BinarizationConfig(activations=None).activations == "float"
