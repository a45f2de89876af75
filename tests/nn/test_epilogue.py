"""What follows a product: accumulators against Python integers, RPReLU, residuals, and the layers that have them."""

import copy

import pytest
import torch
from torch import nn

import proxbit
from proxbit.errors import ConfigError, ModelStateError, UnknownNameError
from proxbit.nn import ACTIVATIONS, Accumulator, BinaryConv2d, BinaryLinear, Epilogue, PackedLinear, RPReLU
from proxbit.nn.packed import add_offset
from proxbit.packing import unpack_signs
from proxbit.quantizers import RowUnits, get_pair
from proxbit.training import ProxConnectArguments, ProxConnectTrainer, overflow_shares
from tiny_models import FAMILIES, SIDE

INTEGERS = ["int8", "int4", "uint4", "sign", "elastic"]
MODES = ["saturate", "wrap"]


def layer(columns=6, rows=6, **options):
    return BinaryLinear(columns, rows, pair=get_pair("bnn"), **options)


def by_hand(z, bits, mode):
    """In Python integers."""
    half = 2 ** (bits - 1)
    if mode == "saturate":
        return min(max(z, -half), half - 1)
    m = (z + half) % (2 * half) - half
    if 2 * m > half:
        return half - m
    return -half - m if 2 * m < -half else m


@pytest.mark.parametrize("mode", MODES)
def test_against_python_integers(mode):
    for bits in (2, 4, 8, 11, 24):
        half = 2 ** (bits - 1)
        values = sorted({v for k in (-3, -2, -1, 0, 1, 2, 3) for v in range(k * half // 2 - 3, k * half // 2 + 4)})
        values = [v for v in values if abs(v) < 2**24]
        accumulator = Accumulator(bits, mode)
        sums = torch.tensor(values, dtype=torch.float32)
        assert accumulator(sums).tolist() == [by_hand(v, bits, mode) for v in values]
        lost = [not -half <= v < half for v in values]
        share, penalty = accumulator.overflow(sums)
        assert float(share) == pytest.approx(sum(lost) / len(values))
        assert float(penalty) == pytest.approx(sum(max(abs(v) - half, 0) for v in values) / len(values))
        with torch.no_grad():
            assert accumulator.overflow(sums).penalty is None


def test_gradients_of_accumulators():
    sums = torch.tensor([-200.0, -100.0, -30.0, 5.0, 100.0, 127.0, 130.0, 300.0])
    expected = {"saturate": [0, 1, 1, 1, 1, 1, 0, 0], "wrap": [1, -1, 1, 1, -1, -1, -1, 1]}
    for mode, slopes in expected.items():
        leaf = sums.clone().requires_grad_()
        Accumulator(8, mode)(leaf).sum().backward()
        assert leaf.grad.tolist() == slopes, mode


@pytest.mark.parametrize(
    ("activations", "mode", "dtype"),
    [
        ("int8", "saturate", torch.float32),
        ("int4", "wrap", torch.float64),
        ("uint4", "saturate", torch.bfloat16),
        ("sign", "wrap", torch.bfloat16),
        ("sign", "saturate", torch.float32),
        ("elastic", "wrap", torch.float32),
    ],
    ids=str,
)
def test_narrow_sums_are_equal_simulated_and_packed(activations, mode, dtype):
    accumulator = Accumulator({"sign": 5, "elastic": 4, "int8": 9}.get(activations, 5), mode)
    latent = layer(90, 40, activations=activations, epilogue=Epilogue(accumulator=accumulator), dtype=dtype).eval()
    packed, x = PackedLinear.from_latent(latent), torch.randn(3, 20, 90).to(dtype)
    with torch.no_grad():
        result = packed(x)
        assert torch.equal(result, latent(x))
        assert torch.equal(packed.overflow.share, latent.overflow.share) and 0 < float(packed.overflow.share) < 1
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
    narrow = BinaryLinear(30, 7, epilogue=Epilogue(accumulator=Accumulator(24)), **options)
    plain = BinaryLinear(30, 7, **options)
    plain.load_state_dict(narrow.state_dict())
    x = torch.randn(4, 30)
    results, grads = [], []
    for each in (narrow, plain):
        leaf = x.clone().requires_grad_()
        results.append(each(leaf))
        results[-1].square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in each.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)
    assert plain.overflow is None


@pytest.mark.parametrize("mode", MODES)
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
        assert set(shares) == {name for name, each in model.named_modules() if isinstance(each, BinaryLinear)}
        proxbit.pack(model).save_pretrained(tmp_path / "packed")
        again = type(model).from_pretrained(tmp_path / "packed")
        assert torch.equal(again(pixels).logits, expected)
        assert overflow_shares(again) == pytest.approx(shares)
        assert torch.equal(proxbit.fuse(again)(pixels).logits, expected)


def test_where_there_are_no_whole_numbers():
    narrow = Epilogue(accumulator=Accumulator(8))
    with pytest.raises(ConfigError, match="choose other activations than 'float'"):
        layer(epilogue=narrow)
    with pytest.raises(ConfigError, match="center='restore' adds floats"):
        layer(activations="sign", center="restore", epilogue=narrow)
    mixed = {"activations": "int8", "accumulator_bits": 16, "overrides": {"*.fc1": {"activations": "float"}}}
    model = proxbit.binarize(FAMILIES["vit"](), proxbit.BinarizationConfig(**mixed))
    assert model.vit.layers[0].mlp.fc1.epilogue.accumulator is None
    assert model.vit.layers[0].mlp.fc2.epilogue.accumulator == Accumulator(16)
    mixed["overrides"]["*.fc1"]["accumulator_bits"] = 8
    with pytest.raises(ConfigError, match="choose other activations"):
        proxbit.binarize(FAMILIES["vit"](), proxbit.BinarizationConfig(**mixed))


def test_accumulators_that_do_not_exist():
    for bits in (1, 25, 8.0, True, "8"):
        with pytest.raises(ConfigError, match="accumulator_bits must be a whole number from 2 to 24"):
            proxbit.BinarizationConfig(activations="sign", accumulator_bits=bits)
    with pytest.raises(UnknownNameError, match="Unknown accumulator 'round'"):
        proxbit.BinarizationConfig(accumulator_mode="round")


def test_rprelu():
    made, x = RPReLU(3, dtype=torch.float64), torch.randn(4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(made(x), nn.functional.leaky_relu(x, 0.25))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    expected = nn.functional.prelu((x - made.corner).flatten(0, 1), made.slope).view_as(x) + made.lift
    torch.testing.assert_close(made(x), expected)
    assert torch.autograd.gradcheck(made, x.requires_grad_())
    made(x).square().sum().backward()
    assert all(float(parameter.grad.abs().min()) > 0 for parameter in made.parameters())


@pytest.mark.parametrize("activations", list(ACTIVATIONS))
def test_an_epilogue_latent_and_packed(activations):
    latent = layer(20, 20, activations=activations, epilogue=Epilogue(rprelu=True, residual=True)).eval()
    for parameter in (*latent.rprelu.parameters(), *latent.activation.parameters()):
        nn.init.uniform_(parameter, 0.3, 0.8)
    plain = layer(20, 20, activations=activations).eval()
    plain.load_state_dict(latent.state_dict(), strict=False)
    packed, x = PackedLinear.from_latent(latent), torch.randn(3, 20)
    with torch.no_grad():
        shifted = plain(x) - latent.rprelu.corner
        expected = torch.where(shifted > 0, shifted, latent.rprelu.slope * shifted) + latent.rprelu.lift + x
        torch.testing.assert_close(latent(x), expected)
        torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)
    assert "residual=True" in repr(packed) and not packed.is_bare


def test_a_residual_goes_into_the_weight_and_an_rprelu_does_not():
    made, x = layer(epilogue=Epilogue(residual=True)).eval(), torch.randn(3, 6)
    torch.testing.assert_close(made.to_float()(x), made(x))
    with pytest.raises(ModelStateError, match="RPReLU"):
        layer(epilogue=Epilogue(rprelu=True)).to_float()
    with pytest.raises(ConfigError, match="as many outputs as inputs; this layer has 8 and 9"):
        layer(8, 9, epilogue=Epilogue(residual=True))


def test_a_float_layer_takes_no_shift_off_its_input():
    """The bias of a layer made up for the shift of its activations; that of the plain layer does not, in a copy."""
    latent = layer(5, 3, activations="sign")
    nn.init.normal_(latent.activation.threshold)
    bias = latent.bias.detach().clone()
    for made in (latent, PackedLinear.from_latent(latent)):
        plain = made.to_float()
        torch.testing.assert_close(plain.bias, bias - plain.weight @ latent.activation.threshold)
        assert torch.equal(made.bias, bias)


@pytest.mark.parametrize("activations", list(ACTIVATIONS))
def test_only_what_learns_is_a_submodule(activations):
    for made in (layer(activations=activations), PackedLinear.from_latent(layer(activations=activations))):
        assert made.activations == activations
        assert ("activation" in dict(made.named_children())) == ACTIVATIONS[activations].learns
        assert any(".activation." in f".{name}" for name in made.state_dict()) == ACTIVATIONS[activations].learns
        made.set_activation(layer().activation)
        assert dict(made.named_children()) == {} and made.activation.kernel == made.activations == "float"


def test_keys_and_their_order():
    """Checkpoints hold the parameters by these names, and the states of their optimizers in this order."""
    plain, options = nn.Linear(6, 6), {"activations": "sign", "epilogue": Epilogue(rprelu=True, residual=True)}
    made = BinaryLinear.from_float(plain, get_pair("bnn"), RowUnits("row", "ls"), **options)
    learned = ["rprelu.corner", "rprelu.slope", "rprelu.lift", "activation.threshold", "activation.scale"]
    assert [name for name, _ in made.named_parameters()] == ["weight", "bias", *learned]
    assert sorted(PackedLinear.from_latent(made).state_dict()) == sorted(["weight", "weight_scale", "bias", *learned])
    assert made.rprelu.corner.device == made.activation.scale.device == plain.weight.device
    assert made.weight is plain.weight and float(made.rprelu.slope.mean()) == 0.25


def test_convolutions_have_an_input_quantizer_and_an_epilogue_too():
    """Floats and nothing, for the time being."""
    made = BinaryConv2d(pair=get_pair("bnn"), in_channels=3, out_channels=4, kernel_size=2)
    packed = proxbit.nn.PackedConv2d.from_latent(made)
    for each in (made, packed):
        assert (each.activations, each.epilogue, each.rprelu, each.overflow) == ("float", Epilogue(), None, None)
        assert list(each.children()) == []


def test_offsets():
    activation = layer().activation
    product, values, offset = torch.randn(2, 3), torch.randn(2, 4), torch.randn(3)
    assert add_offset(product, activation, values, None) is product
    expected = product + nn.functional.linear(values, offset[:, None].expand(3, 4))
    torch.testing.assert_close(add_offset(product, activation, values, offset), expected)


def test_copies_start_without_the_graph_of_a_penalty():
    made, x = layer(activations="sign", epilogue=Epilogue(accumulator=Accumulator(2))), torch.randn(3, 6)
    expected = made(x)
    assert made.overflow.penalty.grad_fn is not None
    averaged = torch.optim.swa_utils.AveragedModel(made).module
    for twin in (copy.deepcopy(made), averaged, copy.copy(made)):
        assert twin.overflow.penalty is None and torch.equal(twin.overflow.share, made.overflow.share)
        assert torch.equal(twin(x), expected) and twin.overflow.penalty == made.overflow.penalty
    made.overflow.penalty.backward()
    assert made.weight.grad is not None


def test_a_deep_copy_computes_with_its_own_rprelu():
    made, x = layer(epilogue=Epilogue(rprelu=True)), torch.randn(3, 6)
    before, twin = made(x), copy.deepcopy(made)
    with torch.no_grad():
        twin.rprelu.lift.add_(1.0)
    assert torch.equal(made(x), before)
    torch.testing.assert_close(twin(x), before + 1)


def test_compiled_in_one_graph():
    torch._dynamo.reset()
    made = layer(30, 7, activations="sign", epilogue=Epilogue(accumulator=Accumulator(4, "wrap"))).eval()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 30)
    torch.testing.assert_close(compiled(x), made(x))


def test_the_old_name_warns():
    with pytest.warns(DeprecationWarning, match=r"proxbit\.nn\.Surroundings is now proxbit\.nn\.BinaryLayer"):
        assert proxbit.nn.Surroundings is proxbit.nn.BinaryLayer
    with pytest.raises(AttributeError, match="no attribute 'Environment'"):
        proxbit.nn.Environment  # noqa: B018
