"""The latent linear layer."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from proxbit.errors import MuRangeError
from proxbit.nn import BinaryLinear, set_mu
from proxbit.quantizers import RowUnits, get_pair

BNN = get_pair("bnn++")
MODES = [("row", "ls", True), ("row", "fixed", False), ("tensor", "fixed", True), ("none", "ls", False)]
every_mode = pytest.mark.parametrize(("normalize", "scale", "bias"), MODES)
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


@pytest.fixture
def tokens(crops):
    """Patches of photographs, `[4, 8, 24]`."""
    return crops(4, 8).transpose(1, 2).flatten(2)


def weights(latent, mu, normalize, scale):
    """Soft and hard weight in double precision, from the formulas."""
    rows = latent.detach().double().numpy()
    means = {"row": np.abs(rows).mean(axis=1, keepdims=True), "tensor": np.abs(rows).mean(), "none": 1.0}
    s = means[normalize] * np.ones((len(rows), 1))
    half = mu * rows / s / 2
    results = []
    for q in (np.tanh(half) + half / np.cosh(half) ** 2, np.where(rows >= 0, 1.0, -1.0)):
        a = s if scale == "fixed" else (q * rows).sum(axis=1, keepdims=True) / (q * q).sum(axis=1, keepdims=True)
        results.append(torch.from_numpy(a * q).float())
    return results


@biases
def test_from_float_owns_the_parameters(bias):
    layer = nn.Linear(24, 5, bias)
    layer.weight.requires_grad_(False)
    latent = BinaryLinear.from_float(layer, BNN, RowUnits())
    assert latent.weight is layer.weight
    assert latent.bias is layer.bias
    assert isinstance(latent, nn.Linear)
    assert (latent.in_features, latent.out_features) == (24, 5)
    assert list(latent.state_dict()) == list(layer.state_dict())
    assert (latent.pair, latent.units) == (BNN, RowUnits())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_training_flag_is_kept_both_ways(training):
    latent = BinaryLinear.from_float(nn.Linear(4, 2).train(training), BNN, RowUnits())
    assert latent.training is training
    assert latent.to_float().training is training


def test_from_float_of_a_layer_without_data():
    latent = BinaryLinear.from_float(nn.Linear(4, 2, device="meta", dtype=torch.bfloat16), BNN, RowUnits())
    assert latent.weight.is_meta
    assert latent.effective_weight().dtype == torch.bfloat16


@every_mode
def test_forward_is_the_linear_layer_of_the_quantized_weight(tokens, bias, normalize, scale):
    layer = BinaryLinear(24, 5, bias, pair=BNN, normalize=normalize, scale=scale)
    mu = 2.0 if normalize != "none" else 20.0
    set_mu(layer, mu)
    soft, hard = weights(layer.weight, mu, normalize, scale)
    torch.testing.assert_close(layer(tokens), nn.functional.linear(tokens, soft, layer.bias), rtol=1e-4, atol=1e-5)
    layer.eval()
    torch.testing.assert_close(layer(tokens), nn.functional.linear(tokens, hard, layer.bias), rtol=1e-4, atol=1e-5)


def test_a_soft_start_is_near_the_float_layer(tokens):
    """With the least-squares scale, the smaller mu, the nearer to the layer it was made from."""
    layer = nn.Linear(24, 5)
    latent = BinaryLinear.from_float(layer, BNN, RowUnits())
    gaps = []
    for mu in (0.01, 0.3, 3.0):
        set_mu(latent, mu)
        gaps.append((latent(tokens) - layer(tokens)).abs().max().item())
    assert gaps[0] < gaps[1] < gaps[2]
    assert gaps[0] < 1e-4


def test_gradients_of_latent_bias_and_input(tokens):
    """Those of the layer, with the multiplier a / s SS'(W / s) on the latent."""
    layer = BinaryLinear(24, 5, pair=BNN)
    set_mu(layer, 1.3)
    tokens.requires_grad_()
    grad = torch.randn(4, 8, 5)
    layer(tokens).backward(grad)
    rows = layer.weight.detach().double().numpy()
    s = np.abs(rows).mean(axis=1, keepdims=True)
    half = 1.3 * rows / s / 2
    q = np.tanh(half) + half / np.cosh(half) ** 2
    a = (q * rows).sum(axis=1, keepdims=True) / (q * q).sum(axis=1, keepdims=True)
    multiplier = a / s * 1.3 / np.cosh(half) ** 2 * (1 - half * np.tanh(half))
    flat_grad, flat_tokens = grad.double().numpy().reshape(-1, 5), tokens.detach().double().numpy().reshape(-1, 24)
    np.testing.assert_allclose(layer.weight.grad.numpy(), flat_grad.T @ flat_tokens * multiplier, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(layer.bias.grad.numpy(), flat_grad.sum(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tokens.grad.numpy().reshape(-1, 24), flat_grad @ (a * q), rtol=1e-3, atol=1e-4)


@every_mode
def test_to_float_holds_plus_and_minus_the_scale(bias, normalize, scale, tokens):
    """Also in the middle of training, when the forward is soft."""
    layer = BinaryLinear(24, 5, bias, pair=BNN, normalize=normalize, scale=scale)
    plain = layer.to_float()
    assert type(plain) is nn.Linear
    assert plain.bias is layer.bias
    assert torch.equal(plain(tokens), layer.eval()(tokens))
    row_scale = layer.hard_rows().scale
    for row, factor, latent in zip(plain.weight, row_scale, layer.weight):
        assert row.tolist() == [factor.item() if value >= 0 else -factor.item() for value in latent.tolist()]
    assert plain.weight.requires_grad
    assert plain.weight.is_leaf


def test_to_float_keeps_a_frozen_weight_frozen():
    layer = BinaryLinear(4, 2, pair=BNN)
    layer.weight.requires_grad_(False)
    assert not layer.to_float().weight.requires_grad


@pytest.mark.parametrize(
    ("dtype", "training"), [(torch.float16, True), (torch.bfloat16, False), (torch.float64, True)], ids=str
)
def test_other_dtypes(tokens, dtype, training):
    layer = BinaryLinear(24, 5, pair=BNN).train(training)
    reference = layer(tokens)
    result = layer.to(dtype)(tokens.to(dtype))
    assert result.dtype == dtype
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(result.float(), reference, rtol=tolerance, atol=tolerance)
    result.sum().backward()
    assert layer.weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(tokens, dtype):
    """The matrix product in half precision; latent and gradient stay in single precision."""
    layer = BinaryLinear(24, 5, pair=BNN)
    with torch.autocast("cpu", dtype):
        result = layer(tokens)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), layer(tokens), rtol=3e-2, atol=3e-2)
    result.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert torch.isfinite(layer.weight.grad).all()


def test_dtype_and_device_arguments():
    layer = BinaryLinear(4, 2, False, pair=BNN, device="meta", dtype=torch.float16)
    assert layer.bias is None
    assert (layer.weight.device.type, layer.weight.dtype, layer.weight.shape) == ("meta", torch.float16, (2, 4))


def test_state_dict_round_trip_with_a_float_layer(tokens):
    """Keys and values are those of the float layer, in both directions."""
    plain = nn.Linear(24, 5)
    layer = BinaryLinear(24, 5, pair=BNN)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.weight, plain.weight)
    other = BinaryLinear(24, 5, pair=BNN)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(tokens), layer(tokens))


def test_a_deep_copy_keeps_quantizer_and_state(tokens):
    layer = BinaryLinear(24, 5, pair=BNN, normalize="tensor", scale="fixed")
    set_mu(layer, 4.0, hard=True)
    twin = copy.deepcopy(layer)
    assert (twin.normalize, twin.scale, twin.mu.item(), twin.hardened) == ("tensor", "fixed", 4.0, True)
    assert torch.equal(twin(tokens), layer(tokens))
    assert twin.weight is not layer.weight
    with pytest.raises(MuRangeError, match="out of range"):
        set_mu(twin, 0.0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_whole_and_not_again_when_mu_moves(tokens, training):
    torch.compiler.reset()
    layer = BinaryLinear(24, 5, pair=BNN).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(tokens).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for mu in (0.7, 11.0):
            set_mu(layer, mu)
            layer.weight.grad = None
            result = compiled(tokens)
            result.square().sum().backward()
            compiled_grad, layer.weight.grad = layer.weight.grad, None
            eager = layer(tokens)
            eager.square().sum().backward()
            torch.testing.assert_close(result, eager)
            torch.testing.assert_close(compiled_grad, layer.weight.grad)
        with pytest.raises(RuntimeError, match="recompil"):
            compiled.train(not training)(tokens)


def test_exports(tokens):
    """The exported evaluation of a latent layer is the hard one."""
    layer = BinaryLinear(24, 5, pair=BNN).eval()
    program = torch.export.export(layer, (tokens,))
    torch.testing.assert_close(program.module()(tokens), layer(tokens))
