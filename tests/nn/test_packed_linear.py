"""The packed linear layer: the numbers of the latent layer it came from, one bit a weight."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from proxbit.errors import PackedFormatError
from proxbit.kernels import linear_kernel
from proxbit.nn import BinaryLinear, PackedLinear
from proxbit.quantizers import RowUnits, get_pair

BNN = get_pair("bnn++")
SHAPES = [(1, 1), (7, 3), (8, 5), (9, 4), (33, 6), (64, 3), (65, 2)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MODES = [("row", "ls"), ("row", "fixed"), ("tensor", "fixed"), ("none", "ls")]
CENTRED = {
    "adabin": dict(normalize="std", scale="fixed", center="restore"),
    "xnor": dict(normalize="none", scale="ls", center="remove"),
}
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def tokens(crops):
    """Patches of photographs, `[4, 8, 24]`."""
    return crops(4, 8).transpose(1, 2).flatten(2)


def latent_layer(columns=24, rows=5, bias=True, **arguments):
    layer = BinaryLinear(columns, rows, bias, pair=BNN, **arguments).eval()
    with torch.no_grad():
        layer.weight[0, 0] = -0.0
    return layer


def test_packed_equals_latent_hard():
    for columns, rows in SHAPES:
        latent = BinaryLinear(columns, rows, rows % 2 == 1, pair=BNN).eval()
        packed = PackedLinear.from_latent(latent)
        for shape in ((columns,), (6, columns), (2, 3, columns), (0, columns)):
            x = torch.randn(shape)
            torch.testing.assert_close(packed(x), latent(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("normalize", "scale"), MODES)
def test_every_scale_is_packed(normalize, scale, tokens):
    latent = latent_layer(normalize=normalize, scale=scale)
    packed = PackedLinear.from_latent(latent)
    torch.testing.assert_close(packed(tokens), latent(tokens), rtol=1e-5, atol=1e-5)
    assert torch.equal(packed.weight_scale, latent.hard_rows().scale)


@dtypes
def test_dtypes(dtype, tokens):
    """The scales have the dtype of the latent; the sums are at least as good as those of the latent layer."""
    latent = latent_layer(dtype=dtype)
    packed = PackedLinear.from_latent(latent)
    assert packed.weight.dtype == torch.uint8
    assert packed.weight_scale.dtype == packed.bias.dtype == dtype
    x = tokens.to(dtype)
    assert packed(x).dtype == dtype
    exact = copy.deepcopy(packed).double()(x.double())
    precision = max(torch.finfo(dtype).eps, 1e-12)
    torch.testing.assert_close(packed(x).double(), exact, rtol=precision, atol=24 * precision / 8)


def test_bits_by_hand():
    latent = BinaryLinear(10, 2, False, pair=BNN)
    with torch.no_grad():
        latent.weight[0] = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10])
        latent.weight[1] = torch.tensor([-1.0, 1, 0.0, -0.0, -1, -1, -1, -1, -1, 1])
    packed = PackedLinear.from_latent(latent)
    assert packed.weight.tolist() == [[0b0101_0101, 0b01], [0b0000_1110, 0b10]]
    assert packed.weight_scale.tolist() == pytest.approx([5.5, 0.8])


@biases
def test_state_dict(bias, tokens):
    """The key of the float weight now holds bytes, beside the scales; nothing else."""
    packed = PackedLinear.from_latent(latent_layer(bias=bias))
    state = packed.state_dict()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == {
        "weight": (torch.uint8, (5, 3)),
        "weight_scale": (torch.float32, (5,)),
    } | ({"bias": (torch.float32, (5,))} if bias else {})
    other = PackedLinear(24, 5, bias)
    assert [tensor.shape for tensor in other.state_dict().values()] == [tensor.shape for tensor in state.values()]
    other.load_state_dict(state)
    assert torch.equal(other(tokens), packed(tokens))
    assert other.weight.data_ptr() != packed.weight.data_ptr()


def test_a_float_state_dict_does_not_fit():
    """Neither way: a size error, never a silently random layer."""
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        PackedLinear(24, 5).load_state_dict(nn.Linear(24, 5).state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(24, 5).load_state_dict(PackedLinear(24, 5).state_dict(), strict=False)


def test_nothing_but_the_bias_is_a_parameter():
    latent = latent_layer()
    packed = PackedLinear.from_latent(latent)
    assert dict(packed.named_parameters()) == {"bias": latent.bias}
    assert packed.bias is latent.bias
    assert set(dict(packed.named_buffers())) == {"weight", "weight_scale"}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_training_flag_is_kept_both_ways_and_changes_nothing(training, tokens):
    latent = latent_layer()
    packed = PackedLinear.from_latent(latent.train(training))
    assert packed.training is training
    assert packed.to_float().training is training
    torch.testing.assert_close(packed(tokens), latent.eval()(tokens), rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_to_the_input(tokens):
    latent = latent_layer()
    packed = PackedLinear.from_latent(copy.deepcopy(latent))
    one, two = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    latent(one).square().sum().backward()
    packed(two).square().sum().backward()
    torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed.bias.grad, latent.bias.grad, rtol=1e-4, atol=1e-4)


@dtypes
def test_to_float_is_exact(dtype):
    """The same weight, to the last bit, whether it comes from the latent or from the packed layer."""
    latent = latent_layer(columns=33, bias=dtype in DTYPES[::2], dtype=dtype)
    packed = PackedLinear.from_latent(latent)
    plain = packed.to_float()
    assert type(plain) is nn.Linear
    assert (plain.in_features, plain.out_features) == (33, 5)
    assert plain.bias is latent.bias
    assert torch.equal(plain.weight, latent.to_float().weight)
    expected = np.where(latent.weight.detach().double() >= 0, 1, -1) * packed.weight_scale.double().numpy()[:, None]
    np.testing.assert_array_equal(plain.weight.detach().double().numpy(), expected)


def test_a_deep_copy_is_independent(tokens):
    packed = PackedLinear.from_latent(latent_layer())
    before = packed(tokens)
    twin = copy.deepcopy(packed)
    assert torch.equal(twin(tokens), before)
    twin.weight.zero_()
    twin.weight_scale.zero_()
    assert torch.equal(packed(tokens), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_casting_the_layer_leaves_the_bits(dtype, tokens):
    packed = PackedLinear.from_latent(latent_layer())
    before, bits = packed(tokens), packed.weight.clone()
    packed.to(dtype)
    assert packed.weight.dtype == torch.uint8
    assert torch.equal(packed.weight, bits)
    assert packed.weight_scale.dtype == packed.bias.dtype == dtype
    torch.testing.assert_close(packed(tokens), before, rtol=2e-2, atol=2e-2)


def test_on_the_meta_device(tokens):
    """Bytes only, no float weight; a checkpoint fills it."""
    packed = PackedLinear(24, 5, device="meta", dtype=torch.bfloat16)
    assert {name: (t.device.type, t.dtype) for name, t in packed.state_dict().items()} == {
        "weight": ("meta", torch.uint8),
        "weight_scale": ("meta", torch.bfloat16),
        "bias": ("meta", torch.bfloat16),
    }
    assert packed(torch.empty(2, 24, device="meta")).shape == (2, 5)
    source = PackedLinear.from_latent(latent_layer())
    packed.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(packed(tokens), source(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packing_a_layer_without_data(dtype):
    """As when a packed checkpoint is loaded: shapes and dtypes are known, data are not."""
    latent = BinaryLinear.from_float(nn.Linear(24, 5, device="meta", dtype=dtype), BNN, RowUnits())
    packed = PackedLinear.from_latent(latent)
    described = {name: (t.device.type, t.dtype, tuple(t.shape)) for name, t in packed.state_dict().items()}
    assert described == {
        "weight": ("meta", torch.uint8, (5, 3)),
        "weight_scale": ("meta", dtype, (5,)),
        "bias": ("meta", dtype, (5,)),
    }


def test_check_packed_names_the_layer():
    packed = PackedLinear.from_latent(latent_layer(columns=9))
    packed.check_packed("blocks.0.fc1")
    packed.weight[3, 1] |= 0b1000
    with pytest.raises(PackedFormatError, match="blocks.0.fc1: the 7 padding bits .* row 3"):
        packed.check_packed("blocks.0.fc1")


def test_input_of_another_width():
    """9 columns: also widths that need as many bytes must be refused, or padding bits would count as weights."""
    packed = PackedLinear.from_latent(latent_layer(columns=9))
    for width in (1, 8, 10, 16, 17):
        with pytest.raises(PackedFormatError, match=rf"width {width}\b"):
            packed(torch.randn(2, width))


def test_integer_input():
    with pytest.raises(PackedFormatError, match="must be floating point, not torch.int64"):
        PackedLinear(9, 5)(torch.ones(2, 9, dtype=torch.int64))


@biases
def test_compiles_and_exports_whole(bias, tokens):
    torch.compiler.reset()
    packed = PackedLinear.from_latent(latent_layer(bias=bias))
    expected = packed(tokens)
    assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(tokens), expected)
    program = torch.export.export(packed, (tokens,))
    assert torch.equal(program.module()(tokens), expected)
    assert program.state_dict["weight"].dtype == torch.uint8


def test_flops_and_description(tokens):
    packed = PackedLinear.from_latent(latent_layer())
    counter = FlopCounterMode(display=False)
    with counter:
        packed(tokens)
    assert counter.get_total_flops() == 2 * 4 * 8 * 24 * 5
    assert packed.kernel == linear_kernel(packed.weight, packed.weight_scale)
    assert packed.columns == 24
    assert repr(packed) == "PackedLinear(in_features=24, out_features=5, bias=True)"


def centred_weight(weight, center):
    """Signs of W - c, times the standard deviation plus c (adabin), or times the mean |W - c| (xnor)."""
    rows = weight.detach().double().numpy().reshape(len(weight), -1)
    mean = rows.mean(axis=1, keepdims=True)
    signs = np.where(rows >= mean, 1.0, -1.0)
    if center == "restore":
        result = mean + signs * np.sqrt(((rows - mean) ** 2).mean(axis=1, keepdims=True))
    else:
        result = signs * np.abs(rows - mean).mean(axis=1, keepdims=True)
    return torch.from_numpy(result.reshape(weight.shape))


@pytest.mark.parametrize(
    ("pair", "dtype", "bias"),
    [
        ("adabin", torch.bfloat16, True),
        ("adabin", torch.float64, False),
        ("xnor", torch.float32, True),
        ("xnor", torch.bfloat16, False),
    ],
    ids=str,
)
def test_centred_rows(pair, dtype, bias, tokens):
    """Latent hard, packed and dequantized layers all compute with the formula's weight; adabin keeps its offset."""
    units = CENTRED[pair]
    latent = BinaryLinear(24, 5, bias, pair=get_pair(pair), dtype=dtype, **units).eval()
    with torch.no_grad():
        latent.weight += torch.linspace(-0.2, 0.2, 5).to(dtype)[:, None]
    packed, expected = PackedLinear.from_latent(latent), centred_weight(latent.weight, units["center"])
    assert [len(set(row.tolist())) for row in packed.to_float().weight] == [2] * 5
    state = {name: tuple(tensor.shape) for name, tensor in packed.state_dict().items()}
    assert state.get("weight_offset") == ((5,) if pair == "adabin" else None)
    assert (packed.weight_offset is None) is (pair == "xnor")
    x, eps = tokens.to(dtype), max(torch.finfo(dtype).eps, 1e-14)
    shift = 0 if latent.bias is None else latent.bias.double()
    exact = x.double() @ expected.T + shift
    for layer in (latent, packed, latent.to_float(), packed.to_float()):
        assert layer(x).dtype == dtype
        torch.testing.assert_close(layer(x).double(), exact, rtol=4 * eps, atol=24 * eps)
    torch.testing.assert_close(packed.to_float().weight.double(), expected, rtol=4 * eps, atol=2 * eps)
    assert torch.equal(packed.to_float().weight, latent.to_float().weight)


def test_an_offset_survives_the_state_dict_and_the_cast(tokens):
    latent = BinaryLinear(24, 5, pair=get_pair("adabin"), **CENTRED["adabin"]).eval()
    packed = PackedLinear.from_latent(latent)
    other = PackedLinear(24, 5, offset=True)
    assert list(other.state_dict()) == list(packed.state_dict())
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(tokens), packed(tokens))
    assert other.bfloat16().weight_offset.dtype == torch.bfloat16
    skeleton = PackedLinear.from_latent(latent.to("meta")).state_dict()
    assert {name: (t.dtype, t.shape) for name, t in skeleton.items()} == {
        name: (t.dtype, t.shape) for name, t in packed.state_dict().items()
    }
    packed.weight_offset[2] = float("nan")
    with pytest.raises(PackedFormatError, match="fc: weight_offset must be finite, row 2 is nan"):
        packed.check_packed("fc")
