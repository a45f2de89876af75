"""What the C++ library is never given: tensors that are not what their sizes say. An error, or the right result."""

import math
import random

import pytest
import torch

from proxbit.errors import PackedFormatError
from proxbit.kernels import LatentRows, LinearCall, Norm, linear_w1, linear_w1a1, linear_w1a8, native, reference
from proxbit.kernels.cpu import isas
from proxbit.kernels.interface import FORMATS
from proxbit.kernels.memory import address_of
from proxbit.packing import pack_signs

OPS = {"float": linear_w1, "int8": linear_w1a8, "sign": linear_w1a1}
OP = torch.ops.proxbit
ROWS, COLUMNS = 24, 36
activations = pytest.mark.parametrize("activations", FORMATS)


def layer(rows=ROWS, columns=COLUMNS):
    return pack_signs(torch.randn(rows, columns)), torch.rand(rows) + 0.5


def freed(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk(tensor):
    """The storage is half as long as the shape says: a view that torch itself would refuse to make."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)
    return tensor


def shifted(tensor):
    """The same numbers, one byte off where they may be."""
    memory = bytearray(1) + bytearray(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    moved = torch.frombuffer(memory, dtype=torch.uint8)[1:].view(torch.uint8)
    storage = moved.untyped_storage()
    result = torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape)
    assert result.data_ptr() % max(2, tensor.element_size()) and storage.nbytes() == len(memory)
    return result


def expected_of(*arguments):
    return reference.linear(LinearCall(*arguments))


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@activations
@pytest.mark.parametrize("spoil", [freed, lambda t: t.to("meta")], ids=["freed", "meta"])
@pytest.mark.parametrize("which", ["weight", "scale", "bias", "norm"])
def test_a_tensor_without_data(activations, spoil, which):
    """A null pointer would end the process."""
    weight, scale = layer()
    tensors = {"weight": weight, "scale": scale, "bias": torch.zeros(ROWS), "norm": torch.ones(COLUMNS)}
    tensors[which] = spoil(tensors[which])
    norm = Norm(tensors.pop("norm"), torch.zeros(COLUMNS), 1e-5)
    with pytest.raises(
        PackedFormatError,
        match=r"were given a tensor \[.*\] (whose storage was freed|on the device meta)|"
        "reaches beyond its storage of 0 bytes",
    ):
        native().linear(LinearCall(activations, torch.randn(2, COLUMNS), **tensors, norm=norm))


@activations
def test_an_input_or_a_threshold_without_data(activations):
    weight, scale = layer()
    with pytest.raises(PackedFormatError, match="whose storage was freed"):
        native().linear(LinearCall(activations, freed(torch.randn(2, COLUMNS)), weight, scale))
    with pytest.raises(PackedFormatError, match="whose storage was freed"):
        native().linear(
            LinearCall(activations, torch.randn(2, COLUMNS), weight, scale, None, freed(torch.zeros(COLUMNS)))
        )


@activations
def test_a_weight_whose_storage_is_too_short(activations):
    weight, scale = layer()
    with pytest.raises(PackedFormatError, match=r"\[24, 5\] of torch.uint8 reaches beyond its storage of 60 bytes"):
        OPS[activations](torch.randn(2, COLUMNS), shrunk(weight), scale)


def test_signs_whose_storage_is_too_short():
    with pytest.raises(PackedFormatError, match="reaches beyond its storage"):
        OP.unpack_signs(shrunk(layer()[0]), COLUMNS, torch.float32)
    with pytest.raises(PackedFormatError, match="reaches beyond its storage"):
        OP.pack_signs(shrunk(torch.randn(ROWS, COLUMNS)))


@activations
def test_a_weight_that_gets_another_shape_in_the_same_place(activations):
    """The tiles of 24 rows are not those of 8, nor those of 48: address and version stay as they were."""
    memory, scales = pack_signs(torch.randn(2 * ROWS, COLUMNS)), torch.rand(2 * ROWS) + 0.5
    weight, x = memory[:ROWS].detach(), torch.randn(3, COLUMNS)
    for rows in (ROWS, 8, 2 * ROWS, ROWS):
        weight.data = memory[:rows]
        expected = expected_of(activations, x, memory[:rows], scales[:rows])
        close(OPS[activations](x, weight, scales[:rows]), expected)


@activations
def test_one_weight_for_two_widths(activations):
    """33 and 40 columns are as many bytes."""
    weight, scale = layer(columns=33)
    for columns in (33, 40, 36, 33):
        x = torch.randn(3, columns)
        close(OPS[activations](x, weight, scale), expected_of(activations, x, weight, scale))


@pytest.mark.parametrize("columns", [41, 48, 32, 0, -1, -(2**62), 2**40, 2**62])
def test_more_columns_than_bits(columns):
    """What lies behind the bits is not read."""
    weight, scale = layer(columns=40)
    for call in (
        lambda: OP.unpack_signs(weight, columns, torch.float32),
        lambda: OP.unpack_weight(weight, scale, columns),
        lambda: OP.linear_w1_grad_input(torch.randn(2, ROWS), weight, scale, columns),
    ):
        with pytest.raises((PackedFormatError, RuntimeError), match="columns of signs are uint8|negative dimension"):
            call()


@pytest.mark.parametrize(
    "packed",
    [torch.zeros(ROWS, 5), torch.zeros(5, dtype=torch.uint8), torch.zeros(2, 2, 5, dtype=torch.uint8)],
    ids=["floats", "one axis", "three axes"],
)
def test_bits_that_are_none(packed):
    with pytest.raises(PackedFormatError, match="columns of signs are uint8"):
        OP.unpack_signs(packed, COLUMNS, torch.float32)


@pytest.mark.parametrize("values", [torch.zeros(5), torch.zeros(2, 2, 2), torch.zeros(2, 2) * 1j], ids=str)
def test_values_that_cannot_be_packed(values):
    with pytest.raises(PackedFormatError, match="Signs are packed of real"):
        OP.pack_signs(values)


@activations
def test_inputs_and_scales_that_are_none(activations):
    weight, scale = layer()
    with pytest.raises(PackedFormatError, match=r"takes \[\.\.\., inputs\] and real scales, not \[\]"):
        OPS[activations](torch.tensor(1.0), weight, scale)
    with pytest.raises(PackedFormatError, match="complex64"):
        OPS[activations](torch.randn(2, COLUMNS), weight, scale * 1j)


@activations
@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3, 0), (0, 36), (2, 0, 36), (0, 0), (0, 3, 0)], ids=str)
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_at_all(activations, shape, rows):
    weight = torch.zeros(rows, -(-shape[-1] // 8), dtype=torch.uint8)
    scale, bias = torch.ones(rows), torch.arange(rows).float()
    result = OPS[activations](torch.zeros(shape), weight, scale, bias)
    assert result.shape == (*shape[:-1], rows)
    if not shape[-1]:
        assert torch.equal(result, bias.expand_as(result))


@activations
def test_views(activations):
    """Strides of zero, one row in several, numbers with another sign than in memory, floats at odd addresses."""
    weight, scale = layer()
    x, bias = torch.randn(4, COLUMNS), torch.randn(ROWS)
    expected = expected_of(activations, x, weight, scale, bias)
    spread = torch.randn(4, 3, 2 * COLUMNS)
    spread[:, 1, ::2] = x
    wide = torch.zeros(2 * ROWS, 10, dtype=torch.uint8)
    wide[::2, ::2] = weight
    for each in (spread[:, 1, ::2], x.T.contiguous().T, torch._neg_view(-x), shifted(x)):
        close(OPS[activations](each, wide[::2, ::2], shifted(scale), torch._neg_view(-bias)), expected)
    one = x[:1].expand(4, COLUMNS)
    close(
        OPS[activations](one, weight, scale[:1].expand(ROWS)),
        expected_of(activations, one, weight, scale[:1].expand(ROWS)),
    )
    assert torch.equal(OP.pack_signs(torch._neg_view(-x)), pack_signs(x))


@pytest.mark.parametrize("isa", isas(native().path))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_at_odd_addresses(isa, dtype):
    """They are copied before the library reads them, bit for bit the same; what was not copied is refused."""
    kernels, x = isas(native().path)[isa], torch.randn(9, COLUMNS).to(dtype)
    weight, scale = layer()
    for name in FORMATS:
        thresholds = torch.randn(COLUMNS) if name == "sign" else None
        moved = None if thresholds is None else shifted(thresholds)
        found = kernels.linear(LinearCall(name, *map(shifted, (x, weight, scale, scale)), moved))
        assert torch.equal(found, kernels.linear(LinearCall(name, x, weight, scale, scale, thresholds)))
    assert torch.equal(kernels.pack_signs(shifted(x)), pack_signs(x))
    with pytest.raises(PackedFormatError, match=f"at an address that is no multiple of {x.element_size()}"):
        address_of(shifted(x))


@pytest.mark.parametrize("isa", isas(native().path))
def test_latent_weights_at_odd_addresses(isa):
    kernels, mu = isas(native().path)[isa], torch.tensor([2.0], dtype=torch.float64)
    latent, grad = torch.randn(5, COLUMNS), torch.randn(5, COLUMNS)
    rows = LatentRows("tanh", latent, mu)
    found, s, a = kernels.quantize_rows(LatentRows("tanh", shifted(latent), shifted(mu)), "ls")
    assert torch.equal(found, kernels.quantize_rows(rows, "ls")[0])
    given, odd = rows._replace(divisor=s, factor=a), rows._replace(divisor=shifted(s), factor=shifted(a))
    assert torch.equal(kernels.quantize_rows(odd, "ls")[0], kernels.quantize_rows(given, "ls")[0])
    found = kernels.gradient_rows(odd._replace(latent=shifted(latent)), shifted(grad), overwrite=True)
    assert torch.equal(found, kernels.gradient_rows(given, grad))


@activations
def test_random_views_of_one_memory(activations):
    """Any sizes, strides and offsets that torch lets one make."""
    draw = random.Random(0)
    memory, bits = torch.randn(4096), torch.randint(256, (4096,)).byte()
    for _ in range(60):
        columns, rows, tokens = draw.randint(1, 70), draw.randint(1, 20), draw.randint(1, 6)
        width = -(-columns // 8)
        x = memory.as_strided((tokens, columns), (draw.randint(0, 90), draw.randint(0, 3)), draw.randint(0, 99))
        weight = bits.as_strided((rows, width), (draw.randint(0, 40), draw.randint(0, 2)), draw.randint(0, 99))
        if columns % 8:
            weight = weight.clone()
            weight[:, -1] &= 2 ** (columns % 8) - 1
        scale = memory.as_strided((rows,), (draw.randint(0, 3),), draw.randint(0, 9)).abs()
        close(OPS[activations](x, weight, scale), expected_of(activations, x, weight, scale))


def test_sums_beyond_32_bits_run_on_the_reference():
    """So many inputs at their peak do not fit in the sums of the library."""
    columns = 2**24 + 8
    assert native().takes("linear", (torch.empty(1, 2**24, device="meta"),))
    assert not native().takes("linear", (torch.empty(1, columns, device="meta"),))
    weight = torch.full((1, columns // 8), 255, dtype=torch.uint8)
    result = linear_w1a8(torch.ones(1, 1).expand(1, columns), weight, torch.ones(1))
    assert math.isclose(float(result), columns, rel_tol=1e-6)
