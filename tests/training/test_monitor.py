"""Flip ratio and hardening gap against direct counts."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ViTForImageClassification

import proxbit
from proxbit.config import BinarizationConfig
from proxbit.nn import latent_layers, set_mu
from proxbit.training import FlipCounter, hardening_gap
from proxbit.training.monitor import latent_histogram, layer_hardening_gap
from tiny_models import vit


def make(pair="bnn++", **changes):
    return proxbit.binarize(ViTForImageClassification(vit()), BinarizationConfig(weights=pair, **changes))


def latents(model):
    return {name: layer.weight.detach().numpy().copy() for name, layer in latent_layers(model)}


def move(model, seed):
    """Add noise of the size of the weights, so that many signs flip and others do not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in latent_layers(model):
            layer.weight.add_(layer.weight.std() * torch.randn(layer.weight.shape, generator=generator))


def count(before, after):
    flips = sum(((before[name] >= 0) != (after[name] >= 0)).sum() for name in before)
    return flips / sum(value.size for value in before.values())


def test_flips_are_counted_since_the_call_before():
    model = make()
    counter, seen = FlipCounter(model), latents(model)
    for seed in range(3):
        move(model, seed)
        expected = count(seen, latents(model))
        assert 0.1 < expected < 0.5
        assert counter.flip_ratio() == pytest.approx(expected, abs=1e-12)
        assert counter.flip_ratio() == 0
        seen = latents(model)


def test_convolutions_count_too():
    model = make(include=["vit.embeddings.patch_embeddings.projection", "*.mlp.fc2"])
    counter, seen = FlipCounter(model), latents(model)
    assert any(value.ndim == 4 for value in seen.values())
    move(model, 0)
    assert counter.flip_ratio() == pytest.approx(count(seen, latents(model)), abs=1e-12)


@pytest.mark.parametrize("pair", ["adabin", "xnor"])
def test_signs_are_those_of_centred_rows(pair):
    """Rows far from zero: their raw signs never change, those of W - mean W do."""

    def centred(model):
        flat = {name: value.reshape(len(value), -1) for name, value in latents(model).items()}
        return {name: rows - rows.mean(axis=1, keepdims=True) for name, rows in flat.items()}

    model = make(pair, include=["vit.embeddings.patch_embeddings.projection", "*.mlp.fc2"]).double()
    with torch.no_grad():
        for _, layer in latent_layers(model):
            layer.weight.add_(10.0)
    counter, raw, seen = FlipCounter(model), latents(model), centred(model)
    move(model, 0)
    assert count(raw, latents(model)) == 0
    expected = count(seen, centred(model))
    assert 0.1 < expected < 0.5
    assert counter.flip_ratio() == pytest.approx(expected, abs=1e-12)
    assert hardening_gap(model) == 0


def test_every_sign_flips():
    model = make()
    counter = FlipCounter(model)
    with torch.no_grad():
        for _, layer in latent_layers(model):
            layer.weight.neg_()
    assert counter.flip_ratio() == 1


def test_zero_is_positive():
    model = make()
    layers = dict(latent_layers(model))
    weight = next(iter(layers.values())).weight
    with torch.no_grad():
        weight[0, 0] = 1.0
        weight[0, 1] = -1.0
    counter = FlipCounter(model)
    with torch.no_grad():
        weight[0, 0] = -0.0
    assert counter.flip_ratio() == 0
    with torch.no_grad():
        weight[0, 1] = 0.0
    assert counter.flip_ratio() == pytest.approx(1 / sum(layer.weight.numel() for layer in layers.values()))


def test_nothing_to_flip_without_latents():
    assert FlipCounter(nn.Linear(2, 2)).flip_ratio() == 0


def swish(units, mu):
    """SS_mu, as in Darabi et al.: 2 s(x) (1 + x (1 - s(x))) - 1 with x = mu w."""
    x = mu * units
    logistic = 1 / (1 + np.exp(-x))
    return 2 * logistic * (1 + x * (1 - logistic)) - 1


def parts(weight, mu):
    """Sums of |soft - hard| and |hard| of one layer: rows divided by their mean, scaled by least squares."""
    weight = weight.astype(np.float64)
    units = weight / np.abs(weight).mean(1, keepdims=True)
    hard = np.where(weight >= 0, 1, -1) * np.abs(weight).mean(1, keepdims=True)
    soft = swish(units, mu)
    soft = soft * (soft * weight).sum(1, keepdims=True) / (soft * soft).sum(1, keepdims=True)
    return np.abs(soft - hard).sum(), np.abs(hard).sum()


@pytest.mark.parametrize("mu", [0.3, 3.0, 30.0])
def test_the_gap_is_the_distance_to_the_hard_weights(mu):
    model = make()
    set_mu(model, mu)
    sums = np.array([parts(weight, mu) for weight in latents(model).values()])
    assert hardening_gap(model) == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum(), rel=1e-4)
    _, layer = next(latent_layers(model))
    distance, size = layer_hardening_gap(layer)
    assert (float(distance), float(size)) == pytest.approx(tuple(sums[0]), rel=1e-4)


def test_the_gap_does_not_depend_on_the_mode():
    model = make()
    set_mu(model, 1.0)
    assert hardening_gap(model.train()) == hardening_gap(model.eval()) > 0.1


def test_the_gap_is_zero_once_hard():
    model = make()
    set_mu(model, 1.0, hard=True)
    assert hardening_gap(model) == 0


def test_the_gap_of_a_pair_with_a_hard_forward_is_zero():
    assert hardening_gap(make("bnn")) == 0


def test_the_gap_is_zero_without_latents():
    assert hardening_gap(nn.Linear(2, 2)) == 0


def test_watching_changes_nothing():
    model = make()
    before = copy.deepcopy(model.state_dict())
    FlipCounter(model).flip_ratio()
    hardening_gap(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def layer_of(rows, **changes):
    """A latent layer that holds the given rows."""
    model = make(**changes)
    layer = next(layer for _, layer in latent_layers(model))
    layer.weight = nn.Parameter(torch.tensor(rows))
    return layer


def test_latents_are_counted_in_row_units():
    """Rows with mean |w| = 1 and 10 count alike. Bins are 6 / 41 wide, from -3 on."""
    rows = [[0.0, 0.2, -0.2, 3.6], [0.0, 2.0, -2.0, 36.0]]
    expected = [0] * 43
    for value in (0.0, 0.2, -0.2):
        expected[1 + int((value + 3) // (6 / 41))] = 2
    expected[42] = 2
    assert latent_histogram(layer_of(rows)).tolist() == expected
    assert latent_histogram(layer_of([[-4.0, 1e-3, 1e-3, 1e-3]])).tolist()[0] == 1


def test_latents_are_centred_where_the_layer_does():
    plain, centred = layer_of([[9.0, 9.0, 11.0, 11.0]]), layer_of([[9.0, 9.0, 11.0, 11.0]], pair="adabin")
    assert np.flatnonzero(latent_histogram(plain)).tolist() == [
        1 + int((0.9 + 3) // (6 / 41)),
        1 + int((1.1 + 3) // (6 / 41)),
    ]
    assert np.flatnonzero(latent_histogram(centred)).tolist() == [
        1 + int((-1 + 3) // (6 / 41)),
        1 + int((1 + 3) // (6 / 41)),
    ]


def test_what_is_no_number_is_not_counted():
    counts = latent_histogram(layer_of([[float("nan"), 1.0], [1.0, -1.0], [0.0, 0.0]]))
    assert counts.shape == (43,)
    assert int(counts.sum()) == 4


def test_ratios_of_layers_add_up():
    model = make()
    counter, seen = FlipCounter(model), latents(model)
    move(model, 1)
    total = counter.flip_ratio()
    now = latents(model)
    assert counter.ratios == {name: pytest.approx(count({name: seen[name]}, {name: now[name]})) for name in seen}
    sizes = {name: weight.size for name, weight in seen.items()}
    assert total == pytest.approx(sum(counter.ratios[name] * sizes[name] for name in sizes) / sum(sizes.values()))
