"""How much the loss minds that a layer becomes binary: a slope, taken without leaving a trace."""

import copy

import pytest
import torch
from torch import nn

import proxbit
from proxbit.errors import ConfigError
from proxbit.nn import latent_layers
from proxbit.training import taylor_sensitivity
from tiny_models import FAMILIES, LABELS, SIDE


def batches(crops, dtype=torch.float64):
    """Five images in two batches."""
    pixels, labels = crops(5, SIDE).to(dtype), torch.arange(5) % LABELS
    return [{"pixel_values": pixels[:3], "labels": labels[:3]}, {"pixel_values": pixels[3:], "labels": labels[3:]}]


def prepared(family, dtype=torch.float64):
    """Norms of batches have seen something, so that evaluation differs from training."""
    model = FAMILIES[family]().to(dtype)
    nn.init.normal_(model.classifier.weight if isinstance(model.classifier, nn.Linear) else model.classifier[1].weight)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def sensitivity(model, data):
    return taylor_sensitivity(model, lambda batch: model(**batch).loss, data)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_it_is_the_slope_of_the_loss_on_the_way_to_the_hard_weight(family, crops):
    """By central differences of the float model's loss, towards sign(w) times the mean |w| of the row."""
    plain, data = prepared(family).eval(), batches(crops)
    model = proxbit.binarize(copy.deepcopy(plain), proxbit.BinarizationConfig()).train()
    found = sensitivity(model, data)
    assert list(found) == [name for name, _ in latent_layers(model)]

    @torch.no_grad()
    def loss():
        return sum(float(plain(**batch).loss) for batch in data) / len(data)

    for name, score in found.items():
        weight = plain.get_submodule(name).weight.data
        start, rows = weight.clone(), weight.flatten(1)
        hard = (torch.where(rows >= 0, 1.0, -1.0) * rows.abs().mean(dim=1, keepdim=True)).view_as(weight)
        ends = []
        for way in (-1e-4, 1e-4):
            weight.copy_(start + way * (hard - start))
            ends.append(loss())
        weight.copy_(start)
        assert score == pytest.approx(abs(ends[1] - ends[0]) / 2e-4, rel=1e-4, abs=1e-9), name
    assert max(found.values()) > 2 * min(found.values()) > 0


def test_activations_wait_and_nothing_is_dropped(crops):
    """Neither signs of activations nor dropout change what is found, in whatever mode the model is."""
    data, plain = batches(crops, torch.float32), prepared("vit", torch.float32)
    expected = sensitivity(proxbit.binarize(copy.deepcopy(plain), proxbit.BinarizationConfig()), data)
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model = proxbit.binarize(plain, proxbit.BinarizationConfig(activations="sign")).train()
    assert sensitivity(model, data) == pytest.approx(expected, rel=1e-4)
    assert sensitivity(model.eval(), data) == pytest.approx(expected, rel=1e-4)


def test_it_leaves_no_trace(crops):
    model = proxbit.binarize(prepared("resnet"), proxbit.BinarizationConfig()).train()
    layers = dict(latent_layers(model))
    frozen = next(iter(layers.values()))
    frozen.weight.requires_grad_(False)
    frozen.waits = frozenset({"weight"})
    before = copy.deepcopy(model.state_dict())
    assert sensitivity(model, batches(crops))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [not layer.weight.requires_grad for layer in layers.values()] == [
        layer is frozen for layer in layers.values()
    ]
    assert [layer.waits for layer in layers.values()] == [{"weight"}] + [set()] * (len(layers) - 1)
    assert all(module.training for module in model.modules())
    assert not any(layer.soft_eval for layer in layers.values())


def test_what_is_refused(crops):
    model = proxbit.binarize(prepared("vit"), proxbit.BinarizationConfig())
    with pytest.raises(ConfigError, match="the data is empty"):
        sensitivity(model, [])
    with pytest.raises(ConfigError, match=r"does not depend on vit\.layers\.0\.attention\.q_proj"):
        taylor_sensitivity(model, lambda batch: model.classifier.weight.sum(), [None])
    with pytest.raises(ConfigError, match=r"vit\.layers\.0\.attention\.q_proj: .* NaN or infinite"):
        sensitivity(
            model, [{"pixel_values": torch.full((1, 3, SIDE, SIDE), torch.nan).double(), "labels": torch.tensor([0])}]
        )
    assert not any(layer.waits for _, layer in latent_layers(model))
