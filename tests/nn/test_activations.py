"""Activations as floats, int8 and signs: values, gradients, and the same numbers in latent and packed layers."""

import numpy as np
import pytest
import torch
from torch import nn

import proxbit
from proxbit.errors import ConfigError
from proxbit.nn import BinaryLinear, PackedLinear, check_activations, simulate_activations
from proxbit.quantizers import get_pair
from tiny_models import FAMILIES, SIDE

FORMATS = ["float", "int8", "sign"]
formats = pytest.mark.parametrize("activations", FORMATS)


def test_int8_rounds_each_token_by_its_own_peak():
    x = torch.randn(3, 5, 17) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    peak = np.abs(x.numpy()).max(-1, keepdims=True)
    expected = np.rint(x.numpy() * (np.float32(127) / peak)) * (peak / np.float32(127))
    np.testing.assert_allclose(simulate_activations(x, "int8").numpy(), expected, rtol=1e-6)
    assert len(np.unique(np.rint(expected[2, 0] / (peak[2, 0] / 127)))) > 10


def test_int8_of_rows_without_a_scale():
    x = torch.zeros(3, 4)
    x[1] = 1e-35
    x[2, 0] = torch.inf
    result = simulate_activations(x, "int8")
    assert torch.equal(result[:2], torch.zeros(2, 4))
    assert bool(result[2].isnan().all())


def test_signs():
    x = torch.tensor([-2.0, -0.5, -0.0, 0.0, 0.5, 3.0])
    assert simulate_activations(x, "sign").tolist() == [-1, -1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("activations", "expected"), [("float", [1] * 5), ("int8", [1] * 5), ("sign", [0, 1, 1, 1, 0])]
)
def test_gradients(activations, expected):
    x = torch.tensor([-2.0, -1.0, 0.1, 1.0, 2.0], requires_grad=True)
    simulate_activations(x, activations).sum().backward()
    assert x.grad.tolist() == expected


def test_unknown_formats_are_refused():
    message = "activations must be one of float, int8, sign; not 'int4'"
    for make in (
        lambda: check_activations("int4"),
        lambda: PackedLinear(8, 2, activations="int4"),
        lambda: BinaryLinear(8, 2, pair=get_pair("bnn"), activations="int4"),
        lambda: proxbit.BinarizationConfig(activations="int4"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


@formats
@pytest.mark.parametrize("center", ["none", "restore"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_packed_layer_computes_what_the_latent_one_simulates(activations, center, dtype):
    latent = BinaryLinear(30, 7, pair=get_pair("bnn"), center=center, activations=activations, dtype=dtype).eval()
    packed = PackedLinear.from_latent(latent)
    x = torch.randn(2, 5, 30, dtype=dtype)
    torch.testing.assert_close(packed(x), latent(x), rtol=1e-5, atol=1e-5)
    dense = simulate_activations(x, activations) @ latent.effective_weight(hard=True).T + latent.bias
    torch.testing.assert_close(latent(x), dense, rtol=1e-5, atol=1e-5)
    assert packed.kernel.endswith("" if activations == "float" else f", {activations}")
    assert ("activations" in repr(packed)) == (activations != "float")


@formats
def test_gradients_reach_the_input_of_a_packed_layer(activations):
    latent = BinaryLinear(30, 7, pair=get_pair("bnn"), activations=activations).eval()
    packed, x = PackedLinear.from_latent(latent), torch.randn(4, 30)
    grads = []
    for layer in (latent, packed):
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)
    assert grads[0].abs().sum() > 0


@formats
def test_a_model_keeps_its_activations_from_binarize_to_reload(activations, crops, tmp_path):
    pixels = crops(2, SIDE)
    model = proxbit.binarize(
        FAMILIES["vit"](), proxbit.BinarizationConfig(weights="bnn", activations=activations)
    ).eval()
    simulated = model(pixels).logits
    assert {m.activations for m in model.modules() if isinstance(m, BinaryLinear)} == {activations}
    proxbit.pack(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert {m.activations for m in again.modules() if isinstance(m, PackedLinear)} == {activations}
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    if activations != "sign":  # One rounding can turn a sign, and with it everything that follows.
        torch.testing.assert_close(again(pixels).logits, simulated, rtol=1e-2, atol=1e-2)
    plain = proxbit.dequantize(again)
    assert all(type(m) is nn.Linear for name, m in plain.named_modules() if name.endswith("fc1"))
