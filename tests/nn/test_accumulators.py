"""Accumulators of few bits: against Python integers, and the same numbers simulated and packed."""

import pytest
import torch
from torch import nn

import proxbit
from proxbit.errors import ConfigError, UnknownNameError
from proxbit.nn import Accumulator, BinaryLinear, PackedLinear
from proxbit.packing import unpack_signs
from proxbit.quantizers import get_pair
from proxbit.training import ProxConnectArguments, ProxConnectTrainer, overflow_shares
from tiny_models import FAMILIES, SIDE

INTEGERS = ["int8", "int4", "uint4", "sign", "elastic"]
modes = pytest.mark.parametrize("mode", ["saturate", "wrap"])


def by_hand(z, bits, mode):
    """In Python integers."""
    half = 2 ** (bits - 1)
    if mode == "saturate":
        return min(max(z, -half), half - 1)
    m = (z + half) % (2 * half) - half
    if 2 * m > half:
        return half - m
    return -half - m if 2 * m < -half else m


@modes
@pytest.mark.parametrize("bits", [2, 4, 8, 11, 24])
def test_against_python_integers(mode, bits):
    half = 2 ** (bits - 1)
    values = sorted({v for k in (-3, -2, -1, 0, 1, 2, 3) for v in range(k * half // 2 - 3, k * half // 2 + 4)})
    values = [v for v in values if abs(v) < 2**24]
    accumulator = Accumulator(bits, mode)
    sums = torch.tensor(values, dtype=torch.float32)
    assert accumulator(sums).tolist() == [by_hand(v, bits, mode) for v in values]
    lost = [not -half <= v < half for v in values]
    assert float(accumulator.overflows(sums)) == pytest.approx(sum(lost) / len(values))
    assert float(accumulator.penalty(sums)) == pytest.approx(sum(max(abs(v) - half, 0) for v in values) / len(values))


def test_gradients():
    sums = torch.tensor([-200.0, -100.0, -30.0, 5.0, 100.0, 127.0, 130.0, 300.0])
    expected = {"saturate": [0, 1, 1, 1, 1, 1, 0, 0], "wrap": [1, -1, 1, 1, -1, -1, -1, 1]}
    for mode, slopes in expected.items():
        leaf = sums.clone().requires_grad_()
        Accumulator(8, mode)(leaf).sum().backward()
        assert leaf.grad.tolist() == slopes, mode


@modes
@pytest.mark.parametrize("activations", INTEGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_simulated_and_packed_are_equal(activations, mode, dtype):
    accumulator = Accumulator({"sign": 5, "elastic": 4, "int8": 9}.get(activations, 5), mode)
    latent = BinaryLinear(
        90, 40, pair=get_pair("bnn"), activations=activations, accumulator=accumulator, dtype=dtype
    ).eval()
    packed, x = PackedLinear.from_latent(latent), torch.randn(3, 20, 90).to(dtype)
    with torch.no_grad():
        result = packed(x)
        assert torch.equal(result, latent(x))
        assert torch.equal(packed.overflow_share, latent.overflow_share) and 0 < float(packed.overflow_share) < 1
        codes, unit = latent.activation.parts(x)
        signs = unpack_signs(packed.weight, 90, torch.float64)
        sums = [[[int(v) for v in row] for row in part] for part in (codes.double() @ signs.T).tolist()]
        expected = torch.tensor([[[by_hand(z, accumulator.bits, mode) for z in r] for r in part] for part in sums])
    exact = expected * unit.double() * packed.weight_scale.double() + packed.bias.double()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(result.double(), exact.detach(), rtol=tolerance, atol=tolerance)
    assert "Accumulator(bits=" in repr(packed)


@pytest.mark.parametrize("activations", INTEGERS)
def test_wide_registers_change_nothing(activations):
    options = {"pair": get_pair("bnn++"), "activations": activations}
    narrow = BinaryLinear(30, 7, accumulator=Accumulator(24), **options)
    plain = BinaryLinear(30, 7, **options)
    plain.load_state_dict(narrow.state_dict())
    x = torch.randn(4, 30)
    results, grads = [], []
    for layer in (narrow, plain):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        results.append(layer(leaf))
        results[-1].square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


@modes
def test_a_model_trains_reports_is_saved_and_reloads(mode, crops, tmp_path):
    examples = [{"pixel_values": pixels, "labels": i % 3} for i, pixels in enumerate(crops(8, SIDE))]
    changes = {"accumulator_bits": 4, "accumulator_mode": mode}
    model = proxbit.binarize(FAMILIES["vit"](), proxbit.get_recipe("w1a1").binarization(**changes))
    losses = []
    for penalty in (0.0, 10.0):
        torch.manual_seed(0)
        arguments = ProxConnectArguments(
            str(tmp_path / "run"), max_steps=1, overflow_penalty=penalty, logging_steps=1, report_to="none", seed=1
        )
        trainer = ProxConnectTrainer(model=model, args=arguments, train_dataset=examples)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        assert 0 < trainer.state.log_history[0]["overflow_share"] < 1
    assert losses[1] > losses[0]
    pixels = crops(2, SIDE)
    with torch.no_grad():
        expected = model.eval()(pixels).logits
        shares = overflow_shares(model)
        assert set(shares) == {name for name, layer in model.named_modules() if isinstance(layer, BinaryLinear)}
        proxbit.pack(model).save_pretrained(tmp_path / "packed")
        again = type(model).from_pretrained(tmp_path / "packed")
        assert torch.equal(again(pixels).logits, expected)
        assert overflow_shares(again) == pytest.approx(shares)
        assert torch.equal(proxbit.fuse(again)(pixels).logits, expected)


def test_where_there_are_no_whole_numbers():
    with pytest.raises(ConfigError, match="choose other activations than 'float'"):
        BinaryLinear(8, 2, pair=get_pair("bnn"), accumulator=Accumulator(8))
    with pytest.raises(ConfigError, match="center='restore' adds floats"):
        BinaryLinear(8, 2, pair=get_pair("bnn"), activations="sign", center="restore", accumulator=Accumulator(8))
    mixed = {"activations": "int8", "accumulator_bits": 16, "overrides": {"*.fc1": {"activations": "float"}}}
    model = proxbit.binarize(FAMILIES["vit"](), proxbit.BinarizationConfig(**mixed))
    assert model.vit.layers[0].mlp.fc1.accumulator is None
    assert model.vit.layers[0].mlp.fc2.accumulator == Accumulator(16)
    mixed["overrides"]["*.fc1"]["accumulator_bits"] = 8
    with pytest.raises(ConfigError, match="choose other activations"):
        proxbit.binarize(FAMILIES["vit"](), proxbit.BinarizationConfig(**mixed))


@pytest.mark.parametrize("bits", [1, 25, 8.0, True, "8"])
def test_bits_out_of_range(bits):
    with pytest.raises(ConfigError, match="accumulator_bits must be a whole number from 2 to 24"):
        proxbit.BinarizationConfig(activations="sign", accumulator_bits=bits)


def test_unknown_modes():
    with pytest.raises(UnknownNameError, match="Unknown accumulator 'round'"):
        proxbit.BinarizationConfig(accumulator_mode="round")


def test_compiled_in_one_graph():
    torch._dynamo.reset()
    layer = BinaryLinear(30, 7, pair=get_pair("bnn"), activations="sign", accumulator=Accumulator(4, "wrap")).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 30)
    torch.testing.assert_close(compiled(x), layer(x))
    assert isinstance(nn.Module.state_dict(layer), dict)
