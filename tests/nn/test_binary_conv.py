"""The latent convolution."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from proxbit.nn import BinaryConv2d, set_mu
from proxbit.quantizers import RowUnits, get_pair

BNN = get_pair("bnn++")
GEOMETRIES = {
    "patches": dict(in_channels=3, out_channels=5, kernel_size=4, stride=4),
    "pointwise": dict(in_channels=3, out_channels=4, kernel_size=1),
    "padded": dict(in_channels=3, out_channels=4, kernel_size=3, padding=1),
    "same": dict(in_channels=3, out_channels=4, kernel_size=3, padding="same"),
    "rectangular": dict(in_channels=3, out_channels=4, kernel_size=(1, 5), stride=(2, 1), padding=(0, 2)),
    "dilated": dict(in_channels=3, out_channels=4, kernel_size=3, dilation=2),
    "depthwise": dict(in_channels=3, out_channels=6, kernel_size=3, groups=3),
    "circular": dict(in_channels=3, out_channels=4, kernel_size=3, padding=1, padding_mode="circular"),
    "reflect": dict(in_channels=3, out_channels=4, kernel_size=3, padding=2, padding_mode="reflect"),
}
biased_geometries = pytest.mark.parametrize(
    ("geometry", "bias"), [(each, i % 2 == 0) for i, each in enumerate(GEOMETRIES.values())], ids=GEOMETRIES
)


@pytest.fixture
def pixels(crops):
    return crops(2, 16)


def float_layer(geometry, bias=True):
    return nn.Conv2d(bias=bias, **geometry)


def with_weight(geometry, weight, bias):
    """A plain convolution of this geometry that holds `weight`."""
    layer = float_layer(geometry, bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def weights(latent, mu):
    """Soft and hard weight in double precision: a row is an output channel, its scale the least-squares one."""
    rows = latent.detach().double().numpy().reshape(len(latent), -1)
    half = mu * rows / np.abs(rows).mean(axis=1, keepdims=True) / 2
    results = []
    for q in (np.tanh(half) + half / np.cosh(half) ** 2, np.where(rows >= 0, 1.0, -1.0)):
        a = (q * rows).sum(axis=1, keepdims=True) / (q * q).sum(axis=1, keepdims=True)
        results.append(torch.from_numpy((a * q).reshape(latent.shape)).float())
    return results


@biased_geometries
def test_from_float_forward_and_back(geometry, bias, pixels):
    """The parameters and the geometry are those of the layer; soft in training, hard in evaluation and as a float."""
    layer = float_layer(geometry, bias).train(bias)
    latent = BinaryConv2d.from_float(layer, BNN, RowUnits("row", "ls"))
    assert isinstance(latent, nn.Conv2d) and latent.training is bias
    assert latent.weight is layer.weight and latent.bias is layer.bias
    assert latent.extra_repr() == layer.extra_repr() and list(latent.state_dict()) == list(layer.state_dict())
    set_mu(latent.train(), 2.0)
    soft, hard = weights(latent.weight, 2.0)
    expected = with_weight(geometry, soft, latent.bias)(pixels)
    torch.testing.assert_close(latent(pixels), expected, rtol=1e-4, atol=1e-5)
    plain = latent.to_float()
    assert type(plain) is nn.Conv2d and plain.training
    assert plain.bias is latent.bias and plain.weight.requires_grad and plain.extra_repr() == latent.extra_repr()
    expected = with_weight(geometry, hard, latent.bias)(pixels)
    torch.testing.assert_close(latent.eval()(pixels), expected, rtol=1e-4, atol=1e-5)
    plus_minus = torch.where(latent.weight >= 0, 1.0, -1.0)
    assert torch.equal(plain.weight, plus_minus * latent.hard_rows().scale.view(-1, 1, 1, 1))
    assert torch.equal(plain(pixels), latent(pixels))


def test_from_float_takes_the_quantizer():
    latent = BinaryConv2d.from_float(float_layer(GEOMETRIES["patches"]), BNN, RowUnits("tensor", "fixed"))
    assert (latent.pair, latent.normalize, latent.scale, latent.center) == (BNN, "tensor", "fixed", "none")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_gradients(pixels, memory_format):
    """Those of the convolution with the quantized weight, times a / s SS'(W / s) on the latent."""
    geometry = GEOMETRIES["padded"]
    latent = BinaryConv2d.from_float(float_layer(geometry), BNN, RowUnits()).to(memory_format=memory_format)
    set_mu(latent, 1.3)
    pixels = pixels.to(memory_format=memory_format).requires_grad_()
    twin_pixels = pixels.detach().clone().requires_grad_()
    rows = latent.weight.detach().double().numpy().reshape(4, -1)
    s = np.abs(rows).mean(axis=1, keepdims=True)
    half = 1.3 * rows / s / 2
    q = np.tanh(half) + half / np.cosh(half) ** 2
    a = (q * rows).sum(axis=1, keepdims=True) / (q * q).sum(axis=1, keepdims=True)
    multiplier = a / s * 1.3 / np.cosh(half) ** 2 * (1 - half * np.tanh(half))
    plain = with_weight(geometry, torch.from_numpy((a * q).reshape(latent.weight.shape)), latent.bias)
    latent(pixels).square().sum().backward()
    plain(twin_pixels).square().sum().backward()
    expected = plain.weight.grad.double().numpy().reshape(rows.shape) * multiplier
    np.testing.assert_allclose(latent.weight.grad.numpy().reshape(rows.shape), expected, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(latent.bias.grad, plain.bias.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(pixels.grad, twin_pixels.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(pixels, dtype):
    latent = BinaryConv2d(pair=BNN, **GEOMETRIES["patches"])
    reference = latent(pixels)
    result = latent.to(dtype)(pixels.to(dtype))
    assert result.dtype == dtype
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(result.float(), reference, rtol=tolerance, atol=tolerance)


def test_state_dict_round_trip_with_a_float_layer(pixels):
    plain = float_layer(GEOMETRIES["patches"])
    latent = BinaryConv2d(pair=BNN, **GEOMETRIES["patches"])
    latent.load_state_dict(plain.state_dict())
    assert torch.equal(latent.weight, plain.weight)
    other = BinaryConv2d(pair=BNN, **GEOMETRIES["patches"])
    other.load_state_dict(latent.state_dict())
    assert torch.equal(other(pixels), latent(pixels))


def test_a_deep_copy_is_independent(pixels):
    latent = BinaryConv2d(pair=BNN, **GEOMETRIES["circular"])
    set_mu(latent, 3.0)
    twin = copy.deepcopy(latent)
    before = latent(pixels)
    assert torch.equal(twin(pixels), before)
    set_mu(twin, 5.0, hard=True)
    assert latent.mu.item() == 3.0
    assert torch.equal(latent(pixels), before)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_whole_and_not_again_when_mu_moves(pixels, training):
    torch.compiler.reset()
    latent = BinaryConv2d(pair=BNN, **GEOMETRIES["circular"]).train(training)
    compiled = torch.compile(latent, fullgraph=True, backend="aot_eager")
    compiled(pixels).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        set_mu(latent, 7.0)
        latent.weight.grad = None
        result = compiled(pixels)
        result.square().sum().backward()
    compiled_grad, latent.weight.grad = latent.weight.grad, None
    eager = latent(pixels)
    eager.square().sum().backward()
    torch.testing.assert_close(result, eager)
    torch.testing.assert_close(compiled_grad, latent.weight.grad)
