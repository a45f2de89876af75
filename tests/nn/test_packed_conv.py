"""The packed convolution: the numbers of the latent layer it came from, one bit a weight."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from proxbit.errors import PackedFormatError
from proxbit.nn import BinaryConv2d, PackedConv2d
from proxbit.quantizers import get_pair

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
CENTRED = {
    "adabin": dict(normalize="std", scale="fixed", center="restore"),
    "xnor": dict(normalize="none", scale="ls", center="remove"),
}
biased_geometries = pytest.mark.parametrize(
    ("geometry", "bias"), [(each, i % 2 == 0) for i, each in enumerate(GEOMETRIES.values())], ids=GEOMETRIES
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def pixels(crops):
    return crops(2, 16)


def latent_layer(geometry="patches", **arguments):
    arguments = GEOMETRIES[geometry] | arguments if isinstance(geometry, str) else geometry | arguments
    layer = BinaryConv2d(pair=BNN, **arguments).eval()
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = -0.0
        layer.weight[0, 0, 0, -1] += 0.25
    return layer


@biased_geometries
def test_packed_is_the_hard_latent_layer(geometry, bias, pixels):
    """Its results, its geometry, its float weight and its plain layer; only the state dict holds bytes.

    Vision models cast their pixels to `projection.weight.dtype`, and MobileNets pad by what a convolution tells.
    """
    latent = latent_layer(geometry, bias=bias)
    packed, plain = PackedConv2d.from_latent(latent), nn.Conv2d(bias=bias, **geometry)
    expected = latent(pixels)
    torch.testing.assert_close(packed(pixels), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed(pixels[0]), expected[0], rtol=1e-5, atol=1e-5)
    for name in ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(packed, name) == getattr(plain, name)
    assert torch.equal(packed.weight, latent.effective_weight()) and packed.weight.dtype == torch.float32
    width, channels = math.ceil(latent.weight[0].numel() / 8), latent.out_channels
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.state_dict().items()} == {
        "weight": (torch.uint8, (channels, width)),
        "weight_scale": (torch.float32, (channels,)),
    } | ({"bias": (torch.float32, (channels,))} if bias else {})


@biased_geometries
def test_to_float_is_exact(geometry, bias):
    """The same weight, to the last bit, whether it comes from the latent or from the packed layer."""
    dtype = torch.float32 if bias else torch.bfloat16
    latent = latent_layer(geometry, bias=bias, dtype=dtype)
    plain = PackedConv2d.from_latent(latent).to_float()
    assert type(plain) is nn.Conv2d
    assert plain.extra_repr() == latent.extra_repr()
    assert plain.bias is latent.bias
    plus_minus = torch.where(latent.weight >= 0, 1.0, -1.0).to(dtype)
    assert torch.equal(plain.weight, plus_minus * latent.hard_rows().scale.view(-1, 1, 1, 1))
    assert torch.equal(plain.weight, latent.to_float().weight)


@pytest.mark.parametrize(("normalize", "scale"), [("row", "ls"), ("tensor", "fixed"), ("none", "ls")])
def test_every_scale_is_packed(normalize, scale, pixels):
    latent = latent_layer(normalize=normalize, scale=scale)
    packed = PackedConv2d.from_latent(latent)
    assert torch.equal(packed.weight_scale, latent.hard_rows().scale)
    torch.testing.assert_close(packed(pixels), latent(pixels), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("geometry", ["patches", "rectangular", "depthwise"])
def test_bits_follow_the_order_of_the_weight(geometry):
    """Column i of a row is element i of the flattened kernel of that output channel."""
    latent = latent_layer(geometry)
    packed = PackedConv2d.from_latent(latent)
    columns = math.prod(latent.weight.shape[1:])
    assert packed.columns == columns
    assert packed.bits.dtype == torch.uint8
    assert packed.bits.shape == (len(latent.weight), math.ceil(columns / 8))
    numbers = [int.from_bytes(bytes(row), "little") for row in packed.bits.tolist()]
    rows = latent.weight.flatten(1).tolist()
    assert numbers == [sum(2**i for i, value in enumerate(row) if value >= 0) for row in rows]


@pytest.mark.parametrize("geometry", ["patches", "reflect"])
def test_state_dict_round_trip(geometry, pixels):
    packed = PackedConv2d.from_latent(latent_layer(geometry))
    other = PackedConv2d(**GEOMETRIES[geometry])
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(pixels), packed(pixels))
    assert other.bits.data_ptr() != packed.bits.data_ptr()


def test_a_float_state_dict_does_not_fit():
    """A size error, never a silently random layer."""
    plain = nn.Conv2d(**GEOMETRIES["patches"])
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        PackedConv2d(**GEOMETRIES["patches"]).load_state_dict(plain.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        plain.load_state_dict(PackedConv2d(**GEOMETRIES["patches"]).state_dict(), strict=False)


def test_only_the_bias_is_a_parameter_and_nothing_a_submodule():
    """A convolution inside would be found, and initialised, by whoever walks the modules."""
    latent = latent_layer()
    packed = PackedConv2d.from_latent(latent)
    assert packed.bias is latent.bias
    assert dict(packed.named_parameters()) == {"bias": latent.bias}
    assert set(dict(packed.named_buffers())) == {"weight", "weight_scale"}
    assert list(packed.children()) == []


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_training_flag_is_kept_both_ways_and_changes_nothing(training, pixels):
    latent = latent_layer().train(training)
    packed = PackedConv2d.from_latent(latent)
    assert packed.training is training
    assert packed.to_float().training is training
    torch.testing.assert_close(packed(pixels), latent.eval()(pixels), rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_to_the_input(pixels):
    latent = latent_layer("circular")
    packed = PackedConv2d.from_latent(copy.deepcopy(latent))
    one, two = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
    latent(one).square().sum().backward()
    packed(two).square().sum().backward()
    torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed.bias.grad, latent.bias.grad, rtol=1e-4, atol=1e-3)


def test_a_deep_copy_is_independent(pixels):
    packed = PackedConv2d.from_latent(latent_layer("reflect"))
    before = packed(pixels)
    twin = copy.deepcopy(packed)
    assert torch.equal(twin(pixels), before)
    twin.bits.zero_()
    twin.weight_scale.zero_()
    assert torch.equal(packed(pixels), before)


@pytest.mark.parametrize("dtype", DTYPES[1::2], ids=str)
def test_casting_the_layer_leaves_the_bits(dtype, pixels):
    packed = PackedConv2d.from_latent(latent_layer())
    before, bits = packed(pixels), packed.bits.clone()
    packed.to(dtype)
    assert packed.bits.dtype == torch.uint8
    assert torch.equal(packed.bits, bits)
    assert packed.weight.dtype == packed.weight_scale.dtype == packed.bias.dtype == dtype
    result = packed(pixels.to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), before, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_input_sets_the_dtype_of_the_result(dtype, pixels):
    """As in the packed linear layer."""
    packed = PackedConv2d.from_latent(latent_layer())
    assert packed(pixels.to(dtype)).dtype == dtype


def test_on_the_meta_device(pixels):
    """Bytes only; while there are no data, `weight` is the buffer to fill."""
    packed = PackedConv2d(device="meta", dtype=torch.bfloat16, **GEOMETRIES["circular"])
    assert {name: (t.device.type, t.dtype) for name, t in packed.state_dict().items()} == {
        "weight": ("meta", torch.uint8),
        "weight_scale": ("meta", torch.bfloat16),
        "bias": ("meta", torch.bfloat16),
    }
    assert packed.weight is packed.bits
    source = PackedConv2d.from_latent(latent_layer("circular"))
    packed.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(packed(pixels), source(pixels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packing_a_layer_without_data(dtype):
    latent = BinaryConv2d(pair=BNN, device="meta", dtype=dtype, **GEOMETRIES["patches"])
    packed = PackedConv2d.from_latent(latent)
    described = {name: (t.device.type, t.dtype, tuple(t.shape)) for name, t in packed.state_dict().items()}
    assert described == {
        "weight": ("meta", torch.uint8, (5, 6)),
        "weight_scale": ("meta", dtype, (5,)),
        "bias": ("meta", dtype, (5,)),
    }


def test_check_packed_names_the_layer():
    packed = PackedConv2d.from_latent(latent_layer("padded"))
    packed.check_packed("embeddings.projection")
    packed.bits[2, -1] |= 0b1000_0000
    with pytest.raises(PackedFormatError, match="embeddings.projection: the 5 padding bits .* row 2"):
        packed.check_packed("embeddings.projection")
    packed = PackedConv2d.from_latent(latent_layer("padded"))
    packed.weight_scale[1] = math.nan
    with pytest.raises(PackedFormatError, match="embeddings.projection: weight_scale must be finite, row 1 is nan"):
        packed.check_packed("embeddings.projection")


@pytest.mark.parametrize("geometry", ["patches", "circular"])
def test_compiles_and_exports_whole(geometry, pixels):
    torch.compiler.reset()
    packed = PackedConv2d.from_latent(latent_layer(geometry))
    expected = packed(pixels)
    torch.testing.assert_close(torch.compile(packed, fullgraph=True, backend="aot_eager")(pixels), expected)
    program = torch.export.export(packed, (pixels,))
    torch.testing.assert_close(program.module()(pixels), expected)
    assert program.state_dict["weight"].dtype == torch.uint8


def test_kernel_name():
    assert PackedConv2d(**GEOMETRIES["patches"]).kernel == "expand + conv2d"


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
    ("pair", "dtype", "geometry"),
    [
        ("adabin", torch.bfloat16, "padded"),
        ("adabin", torch.float32, "depthwise"),
        ("adabin", torch.float64, "reflect"),
        ("xnor", torch.float32, "padded"),
        ("xnor", torch.float64, "patches"),
    ],
    ids=str,
)
def test_centred_rows(pair, dtype, geometry, pixels):
    """Zeros of the padding stay zeros: the offset belongs to the weight, not to the result."""
    units = CENTRED[pair]
    latent = BinaryConv2d(pair=get_pair(pair), dtype=dtype, **units, **GEOMETRIES[geometry]).eval()
    with torch.no_grad():
        latent.weight += torch.linspace(-0.2, 0.2, len(latent.weight)).to(dtype).view(-1, 1, 1, 1)
    packed, expected = PackedConv2d.from_latent(latent), centred_weight(latent.weight, units["center"])
    assert ("weight_offset" in packed.state_dict()) is (pair == "adabin")
    x, eps = pixels.to(dtype), max(torch.finfo(dtype).eps, 1e-14)
    plain = nn.Conv2d(**GEOMETRIES[geometry]).double()
    plain.load_state_dict({"weight": expected, "bias": latent.bias})
    columns = packed.columns
    for layer in (latent, packed, latent.to_float(), packed.to_float()):
        torch.testing.assert_close(layer(x).double(), plain(x.double()), rtol=4 * eps, atol=columns * eps)
    torch.testing.assert_close(packed.weight.double(), expected, rtol=4 * eps, atol=2 * eps)
    for layer in (latent, packed):
        assert torch.equal(layer.to_float().weight, packed.weight)


def test_an_offset_survives_the_state_dict(pixels):
    latent = BinaryConv2d(pair=get_pair("adabin"), **CENTRED["adabin"], **GEOMETRIES["depthwise"]).eval()
    packed, other = PackedConv2d.from_latent(latent), PackedConv2d(offset=True, **GEOMETRIES["depthwise"])
    assert list(other.state_dict()) == list(packed.state_dict())
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(pixels), packed(pixels))
    packed.weight_offset[2] = math.inf
    with pytest.raises(PackedFormatError, match="conv: weight_offset must be finite, row 2 is inf"):
        packed.check_packed("conv")
