"""Activation quantizers: values, gradients against an independent re-write, and the same numbers in packed layers."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import proxbit
from proxbit.errors import ConfigError
from proxbit.nn import ACTIVATIONS, BinaryLinear, Epilogue, PackedLinear, check_activations
from proxbit.nn.activations import make_activation
from proxbit.quantizers import get_pair
from tiny_models import FAMILIES, SIDE

formats = pytest.mark.parametrize("activations", list(ACTIVATIONS))


def quantizer(activations, columns, pair=None, dtype=torch.float32):
    """With parameters that are nowhere special."""
    made = make_activation(activations, columns, pair, dtype=dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.randn(columns) * 0.3 if name == "threshold" else torch.tensor(0.61))
    return made


def layer(activations, columns=30, rows=7, dtype=torch.float32, **options):
    made = BinaryLinear(columns, rows, pair=get_pair("bnn"), activations=activations, dtype=dtype, **options)
    made.activation = quantizer(activations, columns, made.activation.pair, dtype)
    return made.eval()


def test_int8_rounds_each_token_by_its_own_peak():
    x = torch.randn(3, 5, 17) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    peak = np.abs(x.numpy()).max(-1, keepdims=True)
    expected = np.rint(x.numpy() * (np.float32(127) / peak)) * (peak / np.float32(127))
    np.testing.assert_allclose(make_activation("int8", 17)(x).numpy(), expected, rtol=1e-6)
    assert len(np.unique(np.rint(expected[2, 0] / (peak[2, 0] / 127)))) > 10


def test_int8_of_rows_without_a_scale():
    x = torch.zeros(3, 4)
    x[1] = 1e-35
    x[2, 0] = torch.inf
    result = make_activation("int8", 4)(x)
    assert torch.equal(result[:2], torch.zeros(2, 4))
    assert bool(result[2].isnan().all())


def test_levels():
    x = torch.tensor([-100.0, -0.5, -0.0, 0.0, 0.3, 0.31, 3.0, 100.0])
    assert make_activation("float", 8)(x) is x
    expected = {
        "sign": [-0.61, -0.61, 0.61, 0.61, 0.61, 0.61, 0.61, 0.61],
        "elastic": [0, 0, 0, 0, 0, 0.61, 0.61, 0.61],
        "int4": [-8 * 0.61, -0.61, 0, 0, 0, 0.61, 5 * 0.61, 7 * 0.61],
        "uint4": [0, 0, 0, 0, 0, 0.61, 5 * 0.61, 15 * 0.61],
    }
    for activations, levels in expected.items():
        made = quantizer(activations, 8)
        with torch.no_grad():
            getattr(made, "threshold", torch.empty(0)).zero_()
        torch.testing.assert_close(made(x).detach(), torch.tensor(levels), msg=activations)


def test_thresholds_are_of_channels():
    made = quantizer("sign", 3)
    with torch.no_grad():
        made.threshold.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    assert made(torch.tensor([[-1.0, -1.0, 2.0], [0.0, 0.0, 0.0]])).sign().tolist() == [[1, -1, 1], [1, 1, -1]]


@pytest.mark.parametrize("activations", ["int4", "uint4"])
def test_gradients_of_a_learned_step(activations):
    """LSQ: straight through inside, and to the step q - x / step inside, q outside."""
    x = (torch.randn(6, 5, 11, dtype=torch.float64) * 4).requires_grad_()
    made = quantizer(activations, 11, dtype=torch.float64)
    grad = torch.randn(6, 5, 11, dtype=torch.float64)
    made(x).backward(grad)
    low, high = {"int4": (-8, 7), "uint4": (0, 15)}[activations]
    ratio = x.detach().numpy() / (float(made.step) + 1e-8)
    inside = (ratio >= low) & (ratio <= high)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_allclose(x.grad.numpy(), np.where(inside, grad, 0))
    codes = np.rint(np.clip(ratio, low, high))
    to_step = (np.where(inside, codes - ratio, codes) * grad.numpy()).sum() / np.sqrt(11 * high)
    np.testing.assert_allclose(float(made.step.grad), to_step, rtol=1e-6)


@pytest.mark.parametrize(
    ("pair", "activations", "hard"),
    [
        *(("bnn++", activations, hard) for activations in ("sign", "elastic") for hard in (True, False)),
        ("bireal", "sign", False),
        ("bnn", "elastic", False),
        ("ede", "sign", True),
        ("bireal++", "elastic", True),
    ],
)
def test_gradients_of_two_levels(activations, hard, pair):
    """With every pair as the surrogate: against formulas written out here."""
    pair = get_pair(pair)
    x = torch.randn(6, 5, 11, dtype=torch.float64, requires_grad=True)
    made = quantizer(activations, 11, pair, torch.float64)
    grad = torch.randn(6, 5, 11, dtype=torch.float64)
    result = made(x, hard=hard)
    result.backward(grad)
    threshold, scale = made.threshold.detach(), float(made.scale) + 1e-8
    over = x.detach() - threshold
    units = over / scale if activations == "sign" else over / (scale / 2) - 1
    f = (torch.where(units >= 0, 1.0, -1.0) if hard else pair.forward(units, made.mu)).double()
    b = pair.backward(units, made.mu)
    share = 1 / np.sqrt(11)
    if activations == "sign":
        torch.testing.assert_close(result.detach(), scale * f)
        to_scale = f * grad
    else:
        torch.testing.assert_close(result.detach(), scale * (f + 1) / 2)
        to_scale = ((f + 1) / 2 - b * over / scale) * grad
    torch.testing.assert_close(x.grad, b * grad)
    torch.testing.assert_close(made.threshold.grad, -(b * grad).sum((0, 1)))
    torch.testing.assert_close(made.scale.grad[0], to_scale.sum() * share)


def test_elastic_with_the_box_is_lsq():
    """round(z) - z inside, 1 above, 0 below, z = (x - threshold) / scale: BiT's form."""
    x = torch.randn(50, 11, dtype=torch.float64)
    made = quantizer("elastic", 11, get_pair("bnn"), torch.float64)
    made(x).sum().backward()
    z = (x - made.threshold.detach()) / (float(made.scale) + 1e-8)
    lsq = torch.where(z > 1, 1.0, torch.where(z < 0, 0.0, z.round() - z)).sum() / np.sqrt(11)
    torch.testing.assert_close(made.scale.grad[0], lsq)


def test_unknown_formats_are_refused():
    message = "activations must be one of float, int8, int4, uint4, sign, elastic; not 'int3'"
    for make in (
        lambda: check_activations("int3"),
        lambda: PackedLinear(8, 2, activations="int3"),
        lambda: BinaryLinear(8, 2, pair=get_pair("bnn"), activations="int3"),
        lambda: proxbit.BinarizationConfig(activations="int3"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
    with pytest.raises(ConfigError, match=r"need a pair with the levels -1 and \+1"):
        make_activation("sign", 3, get_pair("pc", {"levels": [-1, 0, 1]}))


@pytest.mark.parametrize(
    ("activations", "center", "dtype", "bias"),
    [
        ("float", "restore", torch.float32, False),
        ("float", "none", torch.bfloat16, True),
        ("int8", "none", torch.float64, True),
        ("int8", "restore", torch.bfloat16, False),
        ("int4", "restore", torch.float32, True),
        ("int4", "none", torch.bfloat16, False),
        ("uint4", "none", torch.float32, False),
        ("sign", "restore", torch.float64, True),
        ("sign", "none", torch.float32, False),
        ("elastic", "restore", torch.bfloat16, True),
        ("elastic", "none", torch.float64, False),
    ],
    ids=str,
)
def test_a_packed_layer_computes_what_the_latent_one_simulates(activations, center, dtype, bias):
    latent = layer(activations, center=center, dtype=dtype, bias=bias)
    packed = PackedLinear.from_latent(latent)
    x = torch.randn(2, 5, 30).to(dtype)
    with torch.no_grad():
        result, simulated = packed(x), latent(x)
    dense = nn.functional.linear(latent.activation(x), latent.effective_weight(hard=True), latent.bias)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(simulated, dense.detach(), rtol=tolerance, atol=tolerance)
    if activations == "float":  # Sums of floats, in another order.
        torch.testing.assert_close(result, simulated, rtol=tolerance, atol=tolerance)
    else:
        assert torch.equal(result, simulated)
    assert packed.kernel.endswith("" if activations == "float" else f", {activations}")
    assert ("activations" in repr(packed)) == ("activations" in repr(latent)) == (activations != "float")


@formats
def test_gradients_reach_the_input_of_a_packed_layer(activations):
    center = "restore" if activations in ("float", "int4", "elastic") else "none"
    latent = layer(activations, center=center)
    packed, x = PackedLinear.from_latent(latent), torch.randn(4, 30)
    grads = []
    for each in (latent, packed):
        leaf = x.clone().requires_grad_()
        each(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)
    assert grads[0].abs().sum() > 0


@formats
def test_compiled_in_one_graph(activations):
    torch._dynamo.reset()
    kind = "latent" if activations in ("float", "int4", "sign") else "packed"
    made = layer(activations, epilogue=Epilogue(rprelu=True))
    made = made if kind == "latent" else PackedLinear.from_latent(made)
    x = torch.randn(4, 30)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), made(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), made(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activations", ["sign", "elastic", "int4"])
def test_what_a_packed_layer_keeps_follows_its_tensors(activations):
    packed, x = PackedLinear.from_latent(layer(activations)), torch.randn(4, 30)
    with torch.no_grad():
        before = packed(x)
        assert packed.folded() is packed.folded()
        packed.weight_scale.mul_(2)
        packed.bias.mul_(2)
        torch.testing.assert_close(packed(x), 2 * before)
        again = copy.deepcopy(packed)
        for parameter in packed.activation.parameters():
            parameter.mul_(3)
        assert not torch.allclose(packed(x), 2 * before)
        torch.testing.assert_close(again(x), 2 * before)


@pytest.mark.parametrize("activations", ["sign", "elastic", "int4", "uint4", "int8"])
def test_inputs_that_say_nothing(activations):
    """They give a result like any other, the same packed as latent; `detect_anomalies` is for who wants an error."""
    latent = layer(activations)
    packed, x = PackedLinear.from_latent(latent), torch.tensor([[0.0], [3.0], [torch.nan]]).expand(3, 30)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), latent(x), rtol=0, atol=0, equal_nan=True)


@formats
def test_a_model_keeps_its_activations_from_binarize_to_reload(activations, crops, tmp_path):
    pixels = crops(2, SIDE)
    config = proxbit.BinarizationConfig(weights="bnn", activations=activations, rprelu=True, residual=True)
    model = proxbit.binarize(FAMILIES["vit"](), config).eval()
    learned = [p for name, p in model.named_parameters() if ".activation." in name or ".rprelu." in name]
    with torch.no_grad():
        for parameter in learned:
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        simulated = model(pixels).logits
        model.save_pretrained(tmp_path / "latent")
        again = type(model).from_pretrained(tmp_path / "latent")
        assert torch.equal(again(pixels).logits, simulated)
        proxbit.pack(model).save_pretrained(tmp_path / "packed")
        again = type(model).from_pretrained(tmp_path / "packed")
        assert torch.equal(again(pixels).logits, model(pixels).logits)
        assert torch.equal(model(pixels).logits, simulated) or activations == "float"
    found = {name: m.activations for name, m in again.named_modules() if isinstance(m, PackedLinear)}
    one_signed = {"sign": "elastic", "int4": "uint4"}.get(activations, activations)
    assert {value for name, value in found.items() if name.endswith("fc2")} == {one_signed}
    assert {value for name, value in found.items() if not name.endswith("fc2")} == {activations}


def test_dequantize_gives_the_residual_to_the_weight_and_refuses_an_rprelu(crops):
    pixels = crops(2, SIDE)
    model = proxbit.pack(proxbit.binarize(FAMILIES["vit"](), proxbit.BinarizationConfig(residual=True))).eval()
    before = model(pixels).logits
    plain = proxbit.dequantize(model)
    assert all(type(m) is nn.Linear for name, m in plain.named_modules() if name.endswith(("fc1", "q_proj")))
    torch.testing.assert_close(plain(pixels).logits, before, rtol=1e-4, atol=1e-5)
    model = proxbit.binarize(FAMILIES["vit"](), proxbit.BinarizationConfig(rprelu=True))
    with pytest.raises(proxbit.ProxbitError, match="no plain linear layer that computes the same"):
        proxbit.dequantize(model)


@pytest.mark.parametrize("activations", ["int8", "int4", "sign"])
def test_dequantize_warns_of_outputs_that_are_not_the_same(activations, recwarn):
    model = proxbit.binarize(FAMILIES["vit"](), proxbit.BinarizationConfig(activations=activations))
    proxbit.dequantize(model)
    said = [str(warning.message) for warning in recwarn if "other outputs" in str(warning.message)]
    kinds = "sign activations (10 layers), elastic activations (2 layers)"
    assert said == ([f"The float model has other outputs: it is without {kinds}."] if activations == "sign" else [])
