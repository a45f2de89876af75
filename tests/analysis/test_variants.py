"""The same model in several precisions."""

import copy

import pytest
import torch
from torch import nn

import proxbit
from proxbit.analysis.variants import forward_calls, fused_copy, images, variants
from proxbit.errors import ModelStateError
from proxbit.patching import state_of
from tiny_models import FAMILIES, SIDE


@pytest.fixture
def model():
    return FAMILIES["vit"]().eval()


def test_a_float_model_comes_in_every_precision_and_stays_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    configs = [proxbit.BinarizationConfig(activations=name) for name in ("float", "int8", "sign")]
    made = variants(model, configs)
    assert [name for name in made if name != "int8 dynamic"] == [
        "float",
        "bf16",
        "packed, float",
        "packed, int8",
        "packed, sign",
    ]
    assert {name: state_of(one) for name, one in made.items() if "packed" in name}.keys() == {
        f"packed, {config.activations}" for config in configs
    }
    assert all(state_of(made[f"packed, {config.activations}"]) == "packed" for config in configs)
    assert not any(one.training for one in made.values())
    assert state_of(model) == "float"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_a_model_of_proxbit_comes_with_its_own_activations(model, state, crops):
    proxbit.binarize(model, proxbit.BinarizationConfig(activations="int8"))
    if state == "packed":
        proxbit.pack(model)
    made = variants(model)
    assert "packed, int8" in made and "packed, float" not in made
    assert state_of(made["float"]) == "float" and state_of(model) == state
    picture = crops(1, SIDE)
    torch.testing.assert_close(
        made["packed, int8"](picture).logits, copy.deepcopy(model).eval()(picture).logits, atol=1e-3, rtol=0.01
    )


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_what_is_learned_around_layers_is_not_in_the_float_copies(model, state):
    proxbit.binarize(model, proxbit.get_recipe("w1a1-two-stage").binarization())
    if state == "packed":
        proxbit.pack(model)
    made = variants(model)
    for call in forward_calls(made, 1).values():
        call()
    kinds = {name: {type(m).__name__ for m in one.modules()} for name, one in made.items()}
    assert "RPReLU" in kinds["packed, sign"] and not any("RPReLU" in kinds[name] for name in ("float", "bf16"))
    assert state_of(model) == state and any(type(m).__name__ == "RPReLU" for m in model.modules())


def test_a_packed_copy_leaves_the_model_alone(model):
    assert state_of(fused_copy(model)) == "packed"
    assert state_of(model) == "float"


def test_pictures_have_the_size_of_the_model(model):
    assert images(model, 3)["pixel_values"].shape == (3, 3, SIDE, SIDE)


def test_every_variant_takes_the_pictures(model):
    made = variants(model)
    for name, call in forward_calls(made, 2).items():
        logits = call().logits
        assert logits.shape == (2, 3), name
        assert logits.dtype == (torch.bfloat16 if name == "bf16" else torch.float32)
        assert logits.is_inference()


def test_a_model_that_takes_no_picture_is_refused():
    with pytest.raises(ModelStateError, match="Bilinear takes no image alone"):
        forward_calls({"float": nn.Bilinear(2, 2, 2)}, 1)
