"""A part of a model, binarized alone with the configuration of a part, is what it is in the whole."""

import random

import pytest
from torch import nn

from proxbit.config import BinarizationConfig
from proxbit.nn import BinaryLinear
from proxbit.patching import config_of_part, to_latent
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
def test_it_is_the_same_as_in_the_whole(family, seed):
    whole, alone = nn.ModuleDict({"net": FAMILIES[family](), "other": nn.Linear(4, 4)}), FAMILIES[family]()
    names = [name for name, module in whole.named_modules() if type(module) is nn.Linear]
    choice = random.Random(seed)
    chosen = [name for name in names if choice.random() < 0.7]
    patterns = ["*", *chosen[:3], *(f"*.{name.rpartition('.')[2]}" for name in choice.sample(chosen, 3))]
    overrides = {pattern: choice.choice(FIELDS) for pattern in patterns}
    config = BinarizationConfig(include=chosen, overrides=overrides)
    report, resolved = to_latent(whole, config)
    part = config_of_part(whole, report, resolved, "net")
    found, stored = to_latent(alone, part)
    assert layers(alone) == layers(whole["net"]) != {}
    assert set(found.converted) == {name.removeprefix("net.") for name in chosen if name.startswith("net.")}
    assert stored == part
    assert config_of_part(whole, report, resolved, "") is resolved


def test_learned_attention_goes_by_the_names_of_the_part():
    model = nn.ModuleDict({"a": FAMILIES["vit"](), "b": FAMILIES["vit"]()})
    patterns = ["a.vit.layers.1.attention", "b.vit.layers.*.attention"]
    report, resolved = to_latent(model, BinarizationConfig(learned_attention=patterns))
    first, second = (config_of_part(model, report, resolved, name) for name in "ab")
    assert first.learned_attention == ["vit.layers.1.attention"]
    assert second.learned_attention == ["vit.layers.*.attention"]
