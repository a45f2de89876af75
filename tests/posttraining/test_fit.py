"""Fitting one layer: every format of activations, residuals, RPReLUs, convolutions of every geometry, batch norms."""

import copy

import pytest
import torch
from torch import nn

import proxbit
from proxbit.nn import BinaryConv2d, BinaryLinear, Epilogue
from proxbit.posttraining.fit import Float, fit_norm, layer_of
from proxbit.posttraining.moments import Gathered, Pair
from proxbit.quantizers import get_pair

BC = get_pair("bc")


def gathered(xs, fs=None):
    return Gathered([Pair(x, f) for x, f in zip(xs, xs if fs is None else fs, strict=True)], 1, lambda tensors: tensors)


def fitted(layer, xs, fs=None, takes_means=None):
    """The layer, fitted to what its float weight makes of some inputs; and its relative errors before and after."""
    bias = layer.bias
    original = Float(layer.weight.detach().clone(), None if bias is None else bias.detach().clone())
    rows = layer_of(layer, original, bias is not None if takes_means is None else takes_means)
    data = gathered(xs, fs)
    with torch.no_grad():
        outputs = [rows.floating(pair.floating) for pair in data.pairs]
    result = rows.fit("layer", data, outputs)
    return outputs, result


def error(layer, xs, outputs):
    with torch.no_grad():
        made, wanted = torch.cat([layer.eval()(x) for x in xs]), torch.cat(outputs)
    return float((made - wanted).square().sum() / (wanted - wanted.mean(dim=(0, 1))).square().sum())


def tokens(count=5, width=16):
    mix = torch.randn(width, width)
    return [torch.randn(7, 9, width) @ mix / 4 + torch.linspace(-1, 1, width) for _ in range(count)]


@pytest.mark.parametrize("activations", ["float", "int4", "sign", "elastic"])
def test_the_report_is_what_the_layer_does(activations):
    """Its error after is that of its hard output, and pays what signs of the weights cost."""
    torch.manual_seed(0)
    layer = BinaryLinear(16, 16, pair=BC, activations=activations)
    xs = [x.relu() for x in tokens()] if activations in ("uint4", "elastic") else tokens()
    outputs, result = fitted(layer, xs)
    assert result.tokens == 5 * 63 and result.columns == 16
    assert error(layer, xs, outputs) == pytest.approx(result.after, rel=1e-2)
    assert result.after < 0.75 * result.before and result.after < {"sign": 0.55, "elastic": 0.55}.get(activations, 0.3)


@pytest.mark.parametrize("activations", ["float", "sign"])
def test_it_predicts_the_float_layer_from_other_inputs(activations):
    """The inputs that there are have a scale and a mean of their own: what is fitted undoes them."""
    torch.manual_seed(0)
    layer = BinaryLinear(16, 12, pair=BC, activations=activations)
    fs = tokens()
    xs = [3 * f + 1 for f in fs]
    outputs, result = fitted(layer, xs, fs)
    assert error(layer, xs, outputs) == pytest.approx(result.after, rel=1e-2)
    assert result.after < 0.5 and result.before > 2


def test_without_a_bias_no_mean_is_taken_off():
    torch.manual_seed(0)
    layer = BinaryLinear(16, 12, bias=False, pair=BC)
    xs = tokens()
    outputs, result = fitted(layer, xs)
    with torch.no_grad():
        made, wanted = torch.cat([layer(x) for x in xs]), torch.cat(outputs)
    assert float((made - wanted).square().sum() / wanted.square().sum()) == pytest.approx(result.after, rel=1e-3)
    assert layer.bias is None


def test_a_residual_is_part_of_the_target():
    torch.manual_seed(0)
    layer = BinaryLinear(16, 16, pair=BC, epilogue=Epilogue(residual=True))
    with torch.no_grad():
        layer.weight.add_(torch.eye(16))
    xs = tokens()
    outputs, result = fitted(layer, xs)
    beside = sum(float((y - x).flatten(0, 1).var(0).sum()) for x, y in zip(xs, outputs, strict=True))
    power = sum(float(y.flatten(0, 1).var(0).sum()) for y in outputs)
    assert error(layer, xs, outputs) == pytest.approx(result.after * beside / power, rel=0.1)
    assert result.after < 0.3


def test_an_rprelu_is_fitted_too():
    """Its start of 0.25 below zero would spoil what was fitted; slope and lift in least squares do not."""
    torch.manual_seed(0)
    layer = BinaryLinear(16, 12, pair=BC, epilogue=Epilogue(rprelu=True))
    without = copy.deepcopy(layer)
    without.rprelu = None
    xs = tokens()
    outputs, _ = fitted(layer, xs)
    fitted(without, xs)
    assert error(layer, xs, outputs) <= error(without, xs, outputs) * 1.0001
    assert bool((layer.rprelu.corner == 0).all())


def test_a_pair_of_other_levels_keeps_its_weights():
    layer = BinaryLinear(16, 4, pair=get_pair("pc", {"levels": [-1, 0, 1]}), activations="sign")
    before = layer.weight.detach().clone()
    _, result = fitted(layer, tokens())
    assert result == "its pair has the levels [-1.0, 0.0, 1.0], not -1 and +1"
    assert torch.equal(layer.weight, before) and layer.activation.calibrated


@pytest.mark.parametrize("what", ["input", "float output"])
def test_of_a_constant_the_bias_alone_is_fitted(what):
    layer = BinaryLinear(16, 4, pair=BC)
    xs = [torch.zeros(3, 5, 16)] if what == "input" else tokens(1)
    fs = tokens(1) if what == "input" else [torch.ones(7, 9, 16)]
    if what == "input":
        fs = [fs[0][:3, :5]]
    outputs, result = fitted(layer, xs, fs)
    assert result == f"its {what} is constant: only its bias was fitted"
    torch.testing.assert_close(layer(xs[0]).mean((0, 1)), outputs[0].mean((0, 1)), rtol=1e-4, atol=1e-5)


def test_inputs_that_are_no_numbers_are_refused():
    layer = BinaryLinear(16, 4, pair=BC)
    xs = tokens(2)
    xs[1][0, 0, 0] = torch.nan
    with pytest.raises(proxbit.ProxbitError, match="^layer was given NaN or infinite activations"):
        fitted(layer, xs)


def test_channels_that_are_always_zero_do_no_harm():
    torch.manual_seed(0)
    layer = BinaryLinear(16, 12, pair=BC)
    xs = tokens()
    for x in xs:
        x[..., 3:6] = 0
    outputs, result = fitted(layer, xs)
    assert bool(torch.isfinite(layer.weight).all()) and error(layer, xs, outputs) == pytest.approx(
        result.after, rel=1e-2
    )


CONVOLUTIONS = {
    "plain": dict(kernel_size=3, padding=1),
    "strided": dict(kernel_size=3, stride=2, padding=1),
    "dilated": dict(kernel_size=3, dilation=2, padding=2),
    "same": dict(kernel_size=3, padding="same"),
    "even": dict(kernel_size=2, padding="same"),
    "groups": dict(kernel_size=3, groups=2, padding=1),
    "oblong": dict(kernel_size=(1, 3), padding=(0, 1)),
    "reflect": dict(kernel_size=3, padding=1, padding_mode="reflect"),
    "circular": dict(kernel_size=3, padding=2, padding_mode="circular"),
    "pointwise": dict(kernel_size=1, bias=False),
}


@pytest.mark.parametrize("geometry", CONVOLUTIONS)
def test_convolutions(geometry):
    torch.manual_seed(0)
    layer = BinaryConv2d(pair=BC, in_channels=4, out_channels=6, **CONVOLUTIONS[geometry])
    xs = [nn.functional.avg_pool2d(torch.randn(3, 4, 20, 20), 3, 1) + 0.5 for _ in range(3)]
    outputs, result = fitted(layer, xs)
    rows = layer_of(layer, Float(layer.weight, layer.bias), True)
    patches, made = rows.inputs(xs[0]), rows.outputs(layer(xs[0]), xs[0])
    assert patches.shape[:2] == made.shape[:2] == (made.shape[0], layer.groups)
    by_rows = (rows.hard() @ patches.double().permute(1, 2, 0)).permute(2, 0, 1)
    bias = 0 if layer.bias is None else layer.bias.view(layer.groups, -1)
    torch.testing.assert_close(by_rows + bias, made.double(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        found, wanted = torch.cat([layer(x) for x in xs]), torch.cat(outputs)
    mean = 0 if layer.bias is None else wanted.mean(dim=(0, 2, 3), keepdim=True)
    power = (wanted - mean).square().sum()
    assert float((found - wanted).square().sum() / power) == pytest.approx(result.after, rel=0.2)
    assert result.after < result.before


def test_of_a_large_map_some_positions_are_looked_at():
    layer = BinaryConv2d(pair=BC, in_channels=2, out_channels=6, kernel_size=3)
    _, result = fitted(layer, [torch.randn(4, 2, 64, 64) for _ in range(3)])
    assert 32 * 18 < result.tokens < 4 * 64 * 18


@pytest.mark.parametrize("norm, shape", [(nn.BatchNorm1d, (40, 6)), (nn.BatchNorm2d, (10, 6, 4, 4))])
def test_a_batch_norm_takes_its_statistics_anew(norm, shape):
    torch.manual_seed(0)
    module = norm(6)
    for parameter in (module.weight, module.bias, module.running_mean):
        parameter.data.normal_()
    module.running_var.uniform_(0.5, 2)
    module.eval()
    fs = [torch.randn(shape) for _ in range(3)]
    xs = [torch.linspace(0.5, 2, 6).view(-1, *[1] * (len(shape) - 2)) * f - 1 for f in fs]
    expected = [module(f) for f in fs]
    before = module.running_var.clone()
    fit_norm(module, gathered(fs))
    assert torch.equal(module.running_var, before)
    fit_norm(module, gathered(xs, fs))
    for x, wanted in zip(xs, expected, strict=True):
        torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-4)
