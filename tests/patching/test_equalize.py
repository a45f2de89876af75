"""Input scales in layer normalizations: the same function, better signs, and nothing else touched."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

import proxbit
from normed_block import D, Normed, affine
from proxbit.errors import ConfigError, ModelStateError, PatternError
from proxbit.nn import BinaryLinear, PackedLinear
from tiny_models import FAMILIES, SIDE


def blocks(layers, first, second, attention):
    """Of two blocks: queries, keys and values behind one normalization, the first layer of the MLP behind another."""
    groups = {f"{layers}.{i}.{first}": [f"{layers}.{i}.{attention}.{name}_proj" for name in "qkv"] for i in range(2)}
    return groups | {f"{layers}.{i}.{second}": [f"{layers}.{i}.mlp.fc1"] for i in range(2)}


# The normalizations that are followed by nothing but layers to binarize, and those layers.
GROUPS = {
    "vit": blocks("vit.layers", "layernorm_before", "layernorm_after", "attention"),
    "beit": blocks("beit.layers", "layernorm_before", "layernorm_after", "attention"),
    "dinov2": blocks("dinov2.encoder.layer", "norm1", "norm2", "attention"),
    "clip": blocks("vision_model.encoder.layers", "layer_norm1", "layer_norm2", "self_attn"),
    # Layer normalization of a class of its own, behind the depthwise convolution.
    "convnext": {
        f"convnext.encoder.stages.{stage}.layers.0.layernorm": [f"convnext.encoder.stages.{stage}.layers.0.pwconv1"]
        for stage in (0, 1)
    },
    # Before its attentions, what is normalized is cut into windows first.
    "swin": {
        "swin.encoder.layers.0.blocks.0.layernorm_after": ["swin.encoder.layers.0.blocks.0.mlp.fc1"],
        "swin.encoder.layers.1.blocks.0.layernorm_after": ["swin.encoder.layers.1.blocks.0.mlp.fc1"],
        "swin.encoder.layers.0.downsample.norm": ["swin.encoder.layers.0.downsample.reduction"],
    },
}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def lively(model):
    """With numbers of which every one is felt, layer scales and biases included; fp64."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 1 + 0.3 * noise)
    return model.double().eval()


def weights(model, names):
    return [model.get_submodule(name).weight.detach().double().numpy() for name in names]


def row_scaled_error(before, after, scale):
    """The squared distance of weights from signs times row scales times the input scales that the norm took."""
    rows = np.abs(after).mean(axis=1, keepdims=True)
    return float(((before - rows * np.where(after >= 0, 1, -1) * scale) ** 2).sum())


def pictures(family, crops):
    return {"pixel_values": crops(2, SIDE).double()}


@pytest.mark.parametrize("family", GROUPS)
def test_the_function_of_a_float_model_stays_and_signs_get_better(family, crops):
    model, inputs = lively(FAMILIES[family]()), pictures(family, crops)
    with torch.no_grad():
        logits, start, owned = model(**inputs).logits, copy.deepcopy(model), {id(p) for p in model.parameters()}
        assert proxbit.equalize(model, inputs) is model
        after = model(**inputs).logits
    assert logits.std(dim=0).max() > 1e-4
    torch.testing.assert_close(after, logits, rtol=1e-11, atol=1e-12)
    assert {id(p) for p in model.parameters()} == owned
    groups = GROUPS[family]
    expected = {f"{norm}.{name}" for norm in groups for name in ("weight", "bias")}
    expected |= {f"{name}.weight" for names in groups.values() for name in names}
    assert changed(model, start.state_dict()) == expected
    for norm, names in groups.items():
        (scale,) = [new / old for new, old in zip(weights(model, [norm]), weights(start, [norm]))]
        old, new = (np.concatenate(weights(each, names)) for each in (start, model))
        np.testing.assert_allclose(new * scale, old, rtol=1e-12)  # every reader was divided by the same
        assert scale.min() > 0 and np.log(scale).mean() == pytest.approx(0, abs=1e-12)
        assert row_scaled_error(old, new, scale) < row_scaled_error(old, old, 1)


def test_the_scale_is_what_least_squares_gives_for_the_row_scales():
    """Number by number, for all layers that read the normalization."""
    model = Normed(affine())
    with torch.no_grad():
        model.first.weight *= torch.linspace(0.1, 3, D)
        model.second.weight[:, 5] = 0
        model.first.weight[:, 5] = 0
    old = np.abs(np.concatenate(weights(model, ["first", "second"])))
    norm, bias = (each.detach().double().numpy().copy() for each in (model.norm.weight, model.norm.bias))
    a = [sum(row) / D for row in old]
    b = [sum(a[i] * old[i, j] for i in range(2 * D)) / sum(x * x for x in a) for j in range(D)]
    assert b.pop(5) == 0
    middle = math.exp(sum(math.log(x) for x in b) / len(b))
    b = np.insert([x / middle for x in b], 5, 1)
    proxbit.equalize(model, {"x": torch.randn(5, D)}, proxbit.BinarizationConfig(include=["*"]))
    np.testing.assert_allclose(model.norm.weight.detach(), norm * b, rtol=1e-5)
    np.testing.assert_allclose(model.norm.bias.detach(), bias * b, rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.concatenate(weights(model, ["first", "second"]))), old / b, rtol=1e-5)
    assert b.max() / b.min() > 5


def tied_norms():
    """Two normalizations with one weight."""
    model = nn.Sequential(Normed(affine()), Normed(affine()))
    model[0].norm.weight = model[1].norm.weight
    return model


def outliers():
    """Of sizes that no product of two vectors comes near: with input scales, row scales would fit worse."""
    model = Normed(affine())
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.weight.fill_(1e-3).diagonal().copy_(torch.logspace(0, 2, D))
    return model


EVERYTHING = {"include": ["*"]}


LEFT_ALONE = [
    (lambda: Normed(nn.LayerNorm(D, bias=False)), EVERYTHING),
    (lambda: Normed(nn.LayerNorm(D, elementwise_affine=False)), EVERYTHING),
    (lambda: Normed(affine(), peek=True), EVERYTHING),
    (lambda: Normed(affine(), give=True), EVERYTHING),
    (lambda: Normed(affine(), twice=True), EVERYTHING),
    (lambda: Normed(affine()), {"include": ["first"]}),
    (lambda: Normed(affine()), {**EVERYTHING, "activations": "sign"}),
    (lambda: Normed(affine()), {**EVERYTHING, "overrides": {"second": {"activations": "elastic"}}}),
    (lambda: Normed(affine()), {**EVERYTHING, "residual": True}),
    (tied_norms, EVERYTHING),
    (outliers, EVERYTHING),
]


def test_what_is_left_alone():
    """In both states."""
    for row, (block, options) in enumerate(LEFT_ALONE):
        model, config = block(), proxbit.BinarizationConfig(**options)
        inputs = {"input" if isinstance(model, nn.Sequential) else "x": torch.randn(5, D)}
        for latent in (False, True):
            if latent:
                proxbit.binarize(model, config)
            before = state(model)
            proxbit.equalize(model, inputs, None if latent else config)
            assert changed(model, before) == set(), f"row {row}, latent: {latent}"


def test_latents_that_are_tied_are_left_alone():
    model = proxbit.binarize(Normed(affine()))
    model.second.weight = model.first.weight
    before = state(model)
    proxbit.equalize(model, {"x": torch.randn(5, D)})
    assert changed(model, before) == set()


@pytest.mark.parametrize("family", ["levit", "resnet"])
def test_models_in_which_nothing_fits(family, crops):
    model = FAMILIES[family]()
    before = state(model)
    proxbit.equalize(model)
    assert changed(model, before) == set()


@pytest.mark.parametrize("activations", ["float", "int4"])
def test_before_binarize_is_after_binarize(activations):
    config = proxbit.BinarizationConfig(activations=activations, weights="bnn")
    early, late = (lively(FAMILIES["vit"]()).float() for _ in range(2))
    before = state(early)
    proxbit.binarize(proxbit.equalize(early, config=config), config)
    proxbit.equalize(proxbit.binarize(late, config))
    assert len(changed(early, late.state_dict() | before)) == 2 * (2 * 2 + 4)
    assert all(torch.equal(value, late.state_dict()[name]) for name, value in early.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_kept(dtype):
    model, x = Normed(affine()).to(dtype), torch.randn(5, D, dtype=dtype)
    with torch.no_grad():
        before = copy.deepcopy(model).double()(x.double())
        proxbit.equalize(model, {"x": x})
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        after = model.double()(x.double())
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02 * float(before.abs().max()))


@pytest.mark.parametrize("center", ["none", "restore"])
def test_from_equalize_to_reload(center, crops, tmp_path):
    """Latent, packed, reloaded and fused compute the same; the mean of each row is that of the equalized weight."""
    config = proxbit.BinarizationConfig(weights="bnn", center=center)
    model, inputs = lively(FAMILIES["vit"]()).float(), {"pixel_values": crops(2, SIDE)}
    start = copy.deepcopy(model)
    proxbit.binarize(proxbit.equalize(model, inputs, config), config)
    layer, norms = model.vit.layers[0].mlp.fc1, [each.vit.layers[0].layernorm_after for each in (start, model)]
    assert isinstance(layer, BinaryLinear)
    scale, plain = (norms[1].weight / norms[0].weight).detach(), start.vit.layers[0].mlp.fc1.weight.detach()
    errors = []
    for divisor in (scale, torch.ones(len(scale))):
        weight = plain / divisor
        mean = weight.mean(dim=1, keepdim=True) if center == "restore" else torch.zeros(len(weight), 1)
        size = (weight - mean).abs().mean(dim=1, keepdim=True)
        hard = mean + torch.where(weight >= mean, size, -size)
        errors.append(float((plain - hard * divisor).square().sum()))
        if divisor is scale:
            torch.testing.assert_close(layer.effective_weight(hard=True), hard, rtol=1e-5, atol=1e-6)
    assert errors[0] < errors[1]
    with torch.no_grad():
        expected = model(**inputs).logits
        proxbit.pack(model).save_pretrained(tmp_path)
        again = hf.ViTForImageClassification.from_pretrained(tmp_path)
        assert (again.vit.layers[0].mlp.fc1.weight_offset is not None) == (center == "restore")
        for packed in (model, again, proxbit.fuse(again)):
            assert isinstance(packed.vit.layers[0].mlp.fc1, PackedLinear)
            torch.testing.assert_close(packed(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_is_refused():
    model = proxbit.binarize(Normed(affine()))
    x = {"x": torch.randn(5, D)}
    with pytest.raises(ConfigError, match="latent model has its configuration already: call equalize without one"):
        proxbit.equalize(model, x, proxbit.BinarizationConfig())
    with pytest.raises(ModelStateError, match=r"Normed takes no image alone .*equalize\(model, inputs="):
        proxbit.equalize(model)
    with pytest.raises(ModelStateError, match="float or latent model, this one is packed: call it before pack"):
        proxbit.equalize(proxbit.pack(model), x)
    with pytest.raises(PatternError, match="matches no module"):
        proxbit.equalize(Normed(affine()), x, proxbit.BinarizationConfig(include=["third"]))
    with pytest.raises(RuntimeError):
        proxbit.equalize(Normed(affine()), {"x": torch.randn(5, D + 1)})
