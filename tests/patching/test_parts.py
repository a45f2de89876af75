"""What a model says of itself by its layers makes the same model again, be it a part or a whole."""

import copy
import random

import pytest
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from proxbit.config import BinarizationConfig
from proxbit.errors import ModelStateError
from proxbit.nn import BinaryLinear
from proxbit.patching import config_of, to_latent, to_packed
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


@pytest.mark.parametrize("family", ["vit", "clip", "swin", "deit", "segformer"])
@pytest.mark.parametrize("seed", range(3))
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


@pytest.mark.parametrize("family", ["vit", "segformer", "resnet"])
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
