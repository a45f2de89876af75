"""What stays in single precision in a latent model of half, and that such a model computes in half."""

import pytest
import torch
from torch import nn

import proxbit
from proxbit.config import BinarizationConfig
from proxbit.nn import BinaryConv2d, BinaryLinear, dtype_around, keep_single, latent_layers, unrounded
from proxbit.nn.precision import trained_in_small_steps
from proxbit.quantizers import get_pair

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
BNN = get_pair("bnn++")


def net(dtype=torch.float32, **config):
    """A square layer, so that there can be a residual, and a float layer behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)
    return proxbit.binarize(model, BinarizationConfig(include=["0"], **config))


@HALVES
def test_a_model_of_half_gets_latents_in_single_precision(dtype):
    model = net(dtype, activations="sign", rprelu=True)
    kept = dict(trained_in_small_steps(model))
    assert set(kept) == {
        "0.weight",
        "0.activation.threshold",
        "0.activation.scale",
        *(f"0.rprelu.{n}" for n in ("corner", "slope", "lift")),
    }
    assert {each.dtype for each in kept.values()} == {torch.float32}
    others = {each.dtype for name, each in model.named_parameters() if name not in kept}
    assert others == {dtype} and dtype_around(model) == dtype
    assert dtype_around(net()) == torch.float32


@HALVES
def test_what_was_made_half_is_brought_back_with_its_gradient(dtype):
    model = net(activations="sign")
    whole = model[0].weight.detach().clone()
    model.to(dtype)
    parameter = model[0].weight
    parameter.grad = torch.ones_like(parameter)
    assert keep_single(model) == ["0.weight", "0.activation.threshold", "0.activation.scale"]
    assert model[0].weight is parameter and parameter.grad.dtype == torch.float32
    assert torch.equal(parameter.detach(), whole.to(dtype).float())
    assert model[0].bias.dtype == dtype
    assert keep_single(model) == [] and keep_single(model.double()) == []
    assert parameter.dtype == torch.float64


def test_rounding_in_between_leaves_no_trace():
    model = net()
    before = {name: each.detach().clone() for name, each in trained_in_small_steps(model)}
    with unrounded(model):
        model.half()
    assert all(torch.equal(each, before[name]) for name, each in trained_in_small_steps(model))
    assert model[2].weight.dtype == torch.float16


@HALVES
@pytest.mark.parametrize(
    ("activations", "stage"),
    [
        ("float", "soft"),
        ("float", "evaluated"),
        ("int8", "hard"),
        ("int8", "evaluated"),
        ("int4", "soft"),
        ("int4", "waiting"),
        ("sign", "hard"),
        ("sign", "waiting"),
    ],
)
def test_outputs_and_gradients_are_those_of_a_single_model_rounded(dtype, activations, stage):
    """The output has the dtype of the input, as that of a float layer has; gradients reach the latents in fp32."""
    config = dict(activations=activations, rprelu=True, residual=True)
    models = net(**config), net(dtype, **config)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for model, kind in zip(models, (torch.float32, dtype), strict=True):
        layer = model[0].train(stage != "evaluated")
        with torch.no_grad():
            layer.weight.copy_(models[1][0].weight)
            layer.bias.copy_(models[1][0].bias)
        layer.hardened = stage == "hard"
        layer.waits = frozenset({"activation"} if stage == "waiting" else ())
        y = model(x.to(dtype).to(kind))
        assert y.dtype == kind and layer(x.to(kind)).dtype == kind
        with torch.no_grad():
            assert layer(x.to(kind)).dtype == kind
        y.sum().backward()
        assert layer.weight.grad.dtype == torch.float32
        found.append((y.detach().float(), layer.weight.grad))
    (expected, gradient), (y, grad) = found
    share = 0.05 if dtype == torch.bfloat16 else 0.01
    assert (y - expected).norm() <= share * expected.norm()
    assert (grad - gradient).norm() <= 3 * share * gradient.norm() + 1e-3


@HALVES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_convolution_answers_in_half(dtype, bias):
    """Images that a model has brought to the dtype of the weight come back in that of the bias."""
    layer = BinaryConv2d(pair=BNN, in_channels=3, out_channels=4, kernel_size=2, bias=bias).to(dtype)
    keep_single(layer)
    x = torch.randn(2, 3, 4, 4).to(dtype)
    assert layer.weight.dtype == torch.float32 and layer(x).dtype == dtype
    if bias:
        assert torch.equal(layer(x.to(layer.weight.dtype)), layer(x))


@HALVES
@pytest.mark.parametrize("activations", ["float", "int8", "sign"])
def test_a_packed_or_float_model_is_of_one_dtype(dtype, activations):
    x = torch.randn(5, 8).to(dtype)
    latent = net(dtype, activations=activations).eval()
    with torch.no_grad():
        expected = latent(x)
        packed = proxbit.pack(latent)
        found = packed(x)
    assert {each.dtype for each in packed.state_dict().values()} == {dtype, torch.uint8}
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if activations == "float" else 0.05)
    if activations == "float":
        plain = proxbit.dequantize(net(dtype))
        assert {each.dtype for each in plain.state_dict().values()} == {dtype}


@HALVES
def test_small_steps_are_not_lost(dtype):
    """Each of which would leave a weight of half precision as it is."""
    model = net(dtype)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        for _ in range(1000):
            model[0].weight.sub_(1e-6)
    torch.testing.assert_close(model[0].weight.detach(), before - 1e-3, atol=5e-5, rtol=0)


def test_layers_by_hand_keep_the_dtype_they_are_given():
    layer = BinaryLinear(4, 2, pair=BNN, dtype=torch.float16)
    assert next(latent_layers(layer))[1].weight.dtype == torch.float16
    assert layer(torch.randn(3, 4).half()).dtype == torch.float16
