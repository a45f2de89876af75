"""Fitting a whole model: every family, all or nothing, the same whatever the number of threads."""

import copy

import pytest
import torch
from torch import nn

import proxbit
from families import TABLE
from proxbit.config import BinarizationConfig
from proxbit.errors import ConfigError
from proxbit.nn import latent_layers, learned_modules
from proxbit.posttraining import fit_weights
from test_families import answer, lively, tolerance
from tiny_models import FAMILIES, SIDE


def chunks(crops, count=16, size=8):
    return [{"pixel_values": part} for part in crops(count, SIDE).split(size)]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(("family", "recipe"), [(family, ("w1a32", "w1a1")[i % 2]) for i, family in enumerate(TABLE)])
def test_every_family_comes_nearer_to_its_float_model(recipe, family, crops):
    """Nearer than signs of the weights with quantizers that have seen the same pictures; packed it is the same."""
    row = TABLE[family]
    inputs = row.inputs(crops(8, row.side))
    model = lively(FAMILIES[family](), inputs)
    wanted = answer(model, **inputs)
    config = proxbit.get_recipe(recipe).binarization(residual=False)
    plain = proxbit.binarize(copy.deepcopy(model), config)
    plain = answer(proxbit.calibrate(plain, inputs, weights=False), **inputs)
    report = proxbit.calibrate(proxbit.binarize(model, config), inputs).calibration_report
    hard = answer(model, **inputs)
    assert (hard - wanted).norm() < 0.9 * (plain - wanted).norm()
    layers = dict(latent_layers(model))
    assert {layer.name for layer in report.layers} | set(report.left) == set(layers)
    assert all("constant" in reason for reason in report.left.values())
    assert all(layer.after < layer.before for layer in report.layers)
    assert all(module.calibrated for _, module in learned_modules(model))
    packed = answer(proxbit.pack(model), **inputs)
    torch.testing.assert_close(packed, hard, rtol=0, atol=10 * tolerance(hard))


def test_in_order_of_execution_and_each_once(crops):
    model = proxbit.binarize(FAMILIES["vit"]())
    told = []
    report = fit_weights(model, chunks(crops), images=16, told=lambda name, share: told.append((name, share)))
    parts = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
    order = [f"vit.layers.{i}.{part}" for i in (0, 1) for part in parts]
    assert [layer.name for layer in report.layers] == [name for name, _ in told] == order
    assert sum(share for _, share in told) == pytest.approx(1.0)
    assert report.images == 16 and report.layers[0].tokens == 16 * ((SIDE // 8) ** 2 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_excluded_stays_bit_for_bit(dtype, crops):
    model = FAMILIES["vit"]().to(dtype)
    before = state(model)
    config = BinarizationConfig(modules_to_not_convert=["vit.layers.1.mlp"])
    proxbit.calibrate(proxbit.binarize(model, config), crops(8, SIDE))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[0] for name in changed} == {name for name, _ in latent_layers(model)}


@pytest.mark.parametrize("activations", ["float", "sign"])
def test_threads_change_nothing(activations, crops):
    found = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.manual_seed(0)
        model = proxbit.binarize(FAMILIES["swin"](), BinarizationConfig(activations=activations))
        torch.set_num_threads(threads)
        try:
            fit_weights(model, chunks(crops, 16, 4), images=16)
        finally:
            torch.set_num_threads(before)
        found.append(state(model))
    assert same(*found)


def test_all_or_nothing(crops):
    """The second batch is no number from the second layer on: what was fitted before is undone."""
    model = proxbit.binarize(FAMILIES["vit"](), BinarizationConfig(activations="sign", rprelu=True))
    before = state(model)
    broken = chunks(crops)
    broken[1]["pixel_values"][0, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"vit.layers.0.attention.q_proj was given NaN or infinite activations"):
        fit_weights(model, broken, images=16)
    last = model.vit.layers[1].mlp.fc2
    handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        fit_weights(model, chunks(crops), images=16)
    handle.remove()
    assert same(state(model), before) and not hasattr(model, "calibration_report")
    assert not any(module.calibrated for name, module in learned_modules(model) if "activation" in name)
    assert "forward" not in vars(last) and model.training


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_is_not_reached_is_named_before_anything_changes():
    model = proxbit.binarize(Unused(), BinarizationConfig(include=["*"]))
    before = state(model)
    with pytest.raises(ConfigError, match=r"^spare was not called .* modules_to_not_convert=\['spare'\]"):
        fit_weights(model, [{"x": torch.randn(4, 8)}], images=4)
    assert same(state(model), before)


class Looped(nn.Module):
    """One layer at three depths."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.layer(x)) + 0.1 * x
        return self.head(x)


def test_a_layer_that_is_called_thrice_is_fitted_to_all_its_inputs():
    torch.manual_seed(0)
    model, x = Looped(), torch.randn(600, 24)
    with torch.no_grad():
        wanted = model(x)
    plain = proxbit.binarize(copy.deepcopy(model), BinarizationConfig(include=["layer"])).eval()
    proxbit.binarize(model, BinarizationConfig(include=["layer"]))
    report = fit_weights(model, [{"x": part} for part in x.split(100)], images=600)
    assert [layer.tokens for layer in report.layers] == [1800]
    with torch.no_grad():
        errors = [(each.eval()(x) - wanted).square().mean() for each in (model, plain)]
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("attention", ["proxbit_int8", "proxbit_binary"])
def test_the_float_stream_attends_in_floats(attention, crops):
    """What quantized attention loses is seen, and made up for where it can be."""
    torch.manual_seed(0)
    model = FAMILIES["vit"]()
    inputs = {"pixel_values": crops(8, SIDE)}
    wanted = answer(model, **inputs)
    model.set_attn_implementation(attention)
    proxbit.binarize(model)
    plain = answer(copy.deepcopy(model), **inputs)
    proxbit.calibrate(model, inputs)
    assert (answer(model, **inputs) - wanted).norm() < 0.7 * (plain - wanted).norm()
    scales = [module.scale for name, module in learned_modules(model) if "probabilities" in name]
    assert len(scales) == (2 if attention == "proxbit_binary" else 0) and all(float(scale) != 2 for scale in scales)


def test_narrow_accumulators_are_in_the_loop(crops):
    model = proxbit.binarize(FAMILIES["vit"](), proxbit.get_recipe("w1a8-acc8").binarization())
    inputs = {"pixel_values": crops(8, SIDE)}
    proxbit.calibrate(model, inputs)
    hard = answer(model, **inputs)
    torch.testing.assert_close(answer(proxbit.pack(model), **inputs), hard, rtol=0, atol=tolerance(hard))
