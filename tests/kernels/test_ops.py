"""The operators: values, gradients, registration, compilation, errors, and their FLOP formula."""

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from proxbit.errors import ModelStateError, PackedFormatError
from proxbit.kernels import (
    Norm,
    linear_kernel,
    linear_w1,
    linear_w1a1,
    linear_w1a8,
    native,
    reference,
    round_activations,
    unpack_weight,
)
from proxbit.packing import pack_signs

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COLUMNS = [1, 7, 8, 9, 31, 32, 33, 63, 64, 65]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
biases = pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
LEADING = pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,), (2, 0)], ids=str)


def layer(rows, columns, dtype=torch.float64):
    """Packed bits, scales, bias, and the dense weight in double precision."""
    values = torch.randn(rows, columns)
    scale, bias = (torch.rand(rows) + 0.5).to(dtype), torch.randn(rows).to(dtype)
    dense = np.where(values.numpy() >= 0, 1.0, -1.0) * scale.double().numpy()[:, None]
    return pack_signs(values), scale, bias, dense


@dtypes
@pytest.mark.parametrize("columns", COLUMNS)
@biases
def test_linear_is_the_dense_product(columns, dtype, with_bias):
    weight, scale, bias, dense = layer(6, columns, dtype)
    x = torch.randn(4, columns).to(dtype)
    result = linear_w1(x, weight, scale, bias if with_bias else None)
    assert result.dtype == dtype
    expected = x.double().numpy() @ dense.T + (bias.double().numpy() if with_bias else 0)
    sums = 1e-13 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(
        result.double().numpy(), expected, rtol=max(sums, torch.finfo(dtype).eps), atol=sums * columns
    )


@LEADING
@biases
def test_gradients_of_input_and_bias(leading, with_bias):
    weight, scale, bias, dense = layer(5, 11)
    x = torch.randn(*leading, 11, dtype=torch.float64, requires_grad=True)
    bias = bias.requires_grad_() if with_bias else None
    grad = torch.randn(*leading, 5, dtype=torch.float64)
    linear_w1(x, weight, scale, bias).backward(grad)
    np.testing.assert_allclose(x.grad.numpy(), grad.numpy() @ dense, rtol=1e-12, atol=1e-13)
    if with_bias:
        np.testing.assert_allclose(bias.grad.numpy(), grad.reshape(-1, 5).sum(dim=0).numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("leading", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("columns", [7, 8, 9])
def test_gradcheck(leading, columns):
    weight, scale, bias, _ = layer(4, columns)
    x = torch.randn(*leading, columns, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: linear_w1(x, weight, scale, bias), (x, bias.requires_grad_()))
    assert torch.autograd.gradcheck(lambda x: linear_w1(x, weight, scale), x)


@dtypes
def test_gradients_have_the_dtypes_of_their_tensors(dtype):
    weight, scale, bias, _ = layer(4, 9, torch.float32)
    x, bias = torch.randn(3, 9).to(dtype).requires_grad_(), bias.requires_grad_()
    linear_w1(x, weight, scale, bias).sum().backward()
    assert x.grad.dtype == dtype
    assert bias.grad.dtype == torch.float32
    assert bias.grad.tolist() == [3.0] * 4


def test_only_the_bits_are_kept_for_the_backward():
    """The input of a packed layer is not needed again."""
    weight, scale, bias, _ = layer(4, 64)
    x, kept = torch.randn(128, 64, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear_w1(x, weight, scale, bias)
    assert sorted(tensor.data_ptr() for tensor in kept) == sorted([weight.data_ptr(), scale.data_ptr()])


def views(columns):
    base = torch.randn(6, columns + 3, 8, dtype=torch.float64)
    return {
        "transposed": base.transpose(1, 2)[..., :columns],
        "offset": base.flatten()[5 : 5 + 7 * columns].view(7, columns),
        "strided": torch.randn(9, 2 * columns, dtype=torch.float64)[1::3, 1::2],
        "expanded": torch.randn(columns, dtype=torch.float64).expand(4, columns),
    }


@pytest.mark.parametrize("kind", list(views(9)))
@pytest.mark.parametrize("columns", [8, 9])
def test_views_of_the_input(kind, columns):
    weight, scale, bias, dense = layer(5, columns)
    x = views(columns)[kind]
    assert x.shape[-1] == columns
    expected = x.numpy() @ dense.T + bias.numpy()
    np.testing.assert_allclose(linear_w1(x, weight, scale, bias).numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("columns", [8, 9, 33])
def test_views_of_the_weight(columns):
    weight, scale, bias, dense = layer(10, columns)
    big = torch.full((12, weight.shape[1] + 2), 255, dtype=torch.uint8)
    big[2:, 1:-1] = weight
    x = torch.randn(3, columns, dtype=torch.float64)
    for rows, view in ((slice(None), big[2:, 1:-1]), (slice(1, None, 2), big[3::2, 1:-1])):
        assert not view.is_contiguous()
        result = linear_w1(x, view, scale[rows], bias[rows])
        np.testing.assert_allclose(result.numpy(), x.numpy() @ dense[rows].T + bias.numpy()[rows], rtol=1e-12)
        np.testing.assert_array_equal(unpack_weight(view, scale[rows], columns).numpy(), dense[rows])


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_linear_op(leading, grad, with_bias, dtype):
    """Schema, fake implementation, autograd registration, and ahead-of-time dispatch with dynamic shapes."""
    weight, scale, bias, _ = layer(4, 11, dtype)
    x = torch.randn(*leading, 11).to(dtype).requires_grad_(grad)
    bias = bias.requires_grad_(grad) if with_bias else None
    torch.library.opcheck(torch.ops.proxbit.linear_w1.default, (x, weight, scale, bias))


@pytest.mark.parametrize("name", ["linear_w1", "linear_w1a8", "linear_w1a1"])
def test_opcheck_with_everything_fused(name):
    weight, scale, bias, _ = layer(4, 11, torch.float32)
    levels = {"linear_w1a8": [torch.tensor([0.3, -8.0, 7.0])], "linear_w1a1": [torch.zeros(11)]}.get(name, [])
    arguments = (torch.randn(3, 11), weight, scale, bias, *levels, True, torch.ones(11), torch.zeros(11), 1e-6)
    torch.library.opcheck(getattr(torch.ops.proxbit, name).default, arguments)


def test_the_gradient_passes_where_a_grid_does_not_clip():
    weight, scale, bias, dense = layer(5, 6, torch.float32)
    x = torch.tensor([[-9.0, -8.0, -0.2, 6.9, 7.0, 7.1]]) * 0.25
    x.requires_grad_()
    grad = torch.randn(1, 5)
    linear_w1a8(x, weight, scale, bias, torch.tensor([0.25, -8.0, 7.0])).backward(grad)
    straight = grad.numpy() @ dense
    np.testing.assert_allclose(x.grad.numpy(), straight * [0, 1, 1, 1, 1, 0], rtol=1e-5, atol=1e-6)


def test_the_gradient_of_half_precision_passes_where_its_forward_did_not_clip():
    """A step is no number of bfloat16: rounded, it would clip elsewhere."""
    weight, scale, _, dense = layer(1, 1, torch.float32)
    x = torch.tensor([[1.3046875], [1.296875]], dtype=torch.bfloat16, requires_grad=True)  # 7.009 and 6.967 steps
    linear_w1a8(x, weight, scale, None, torch.tensor([0.18614, -8.0, 7.0])).sum().backward()
    assert (x.grad != 0).tolist() == [[False], [True]]


def test_a_layer_norm_is_whole():
    weight, scale, bias, _ = layer(4, 11, torch.float32)
    x = torch.randn(3, 11)
    with pytest.raises(PackedFormatError, match="norm_weight and norm_bias come together"):
        torch.ops.proxbit.linear_w1(x, weight, scale, bias, norm_bias=torch.zeros(11))
    with pytest.raises(PackedFormatError, match=r"norm_bias must be one number an input, \[11\], not \[4\]"):
        linear_w1(x, weight, scale, bias, norm=Norm(torch.ones(11), torch.zeros(4), 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gelu_and_layer_norm_on_every_dtype(dtype):
    weight, scale, bias, _ = layer(4, 11, torch.float32)
    x, norm = torch.randn(3, 11).to(dtype), Norm(torch.rand(11), torch.randn(11), 1e-5)
    result = linear_w1(x, weight, scale, bias, gelu=True, norm=norm)
    normalized = torch.nn.functional.layer_norm(x.double(), [11], norm.weight.double(), norm.bias.double(), norm.eps)
    expected = torch.nn.functional.gelu(linear_w1(normalized, weight, scale.double(), bias.double()))
    torch.testing.assert_close(result, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_what_is_fused_has_no_gradient():
    weight, scale, bias, _ = layer(4, 11, torch.float32)
    x = torch.randn(3, 11, requires_grad=True)
    for fused in ({"gelu": True}, {"norm": Norm(torch.ones(11), torch.zeros(11), 1e-6)}):
        with pytest.raises(RuntimeError, match="Fused GELU and LayerNorm have no gradient"):
            linear_w1(x, weight, scale, bias, **fused)


@pytest.mark.parametrize("op", [linear_w1, linear_w1a8, linear_w1a1])
def test_a_tangent_is_refused_and_never_dropped(op):
    weight, scale, bias, _ = layer(4, 11, torch.float32)
    x, tangent = torch.randn(3, 11), torch.randn(3, 11)

    def apply(x):
        return op(x, weight, scale, bias)

    for derivative in (
        lambda: torch.func.jvp(apply, (x,), (tangent,)),
        lambda: torch.func.jacfwd(apply)(x),
        lambda: torch.func.jacfwd(torch.func.jacrev(apply))(x),
        lambda: torch.func.jvp(lambda bias: op(x, weight, scale, bias), (bias,), (bias,)),
    ):
        with pytest.raises(ModelStateError, match="no forward-mode derivative"):
            derivative()
    with forward_ad.dual_level():
        with pytest.raises(ModelStateError, match="no forward-mode derivative"):
            apply(forward_ad.make_dual(x, tangent))
        # What does not depend on a tangent is computed, and has a gradient as long as that one does not either.
        leaf, head = x.clone().requires_grad_(), forward_ad.make_dual(torch.ones(4), torch.ones(4))
        result = apply(leaf)
        torch.testing.assert_close(result, apply(x))
        assert torch.autograd.grad(result.sum(), leaf, retain_graph=True)[0].abs().sum() > 0
        with pytest.raises(ModelStateError, match="no forward-mode derivative"):
            torch.autograd.grad((result * head).sum(), leaf)


def test_opcheck_of_views_and_of_the_other_ops():
    weight, scale, bias, _ = layer(4, 11)
    transposed = torch.randn(2, 11, 3, dtype=torch.float64).transpose(1, 2)
    torch.library.opcheck(torch.ops.proxbit.linear_w1.default, (transposed, weight, scale, bias))
    grad = torch.randn(2, 4, 3, dtype=torch.float64).transpose(1, 2)
    torch.library.opcheck(torch.ops.proxbit.linear_w1_grad_input.default, (grad, weight, scale, 11))
    torch.library.opcheck(torch.ops.proxbit.unpack_weight.default, (weight, scale, 11))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_integer_input(dtype, device):
    weight, scale, bias, _ = layer(4, 9)
    with pytest.raises(PackedFormatError, match=f"must be floating point, not {dtype}"):
        linear_w1(*(t.to(device) for t in (torch.ones(2, 9).to(dtype), weight, scale, bias)))


@pytest.mark.parametrize("width", [8, 17, 1, 90])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_width(width, device):
    weight, scale, bias, _ = layer(4, 9)
    message = f"An input of width {width} needs {-(-width // 8)} bytes a row, the packed weight has 2"
    with pytest.raises(PackedFormatError, match=message):
        linear_w1(*(t.to(device) for t in (torch.ones(2, width), weight, scale, bias)))


def test_meta_tensors_have_shapes_and_dtypes_only():
    weight, scale, bias, _ = layer(4, 9, torch.float32)
    x = torch.empty(2, 3, 9, dtype=torch.bfloat16, device="meta")
    result = linear_w1(x, *(t.to("meta") for t in (weight, scale, bias)))
    assert (result.shape, result.dtype, result.device.type) == ((2, 3, 4), torch.bfloat16, "meta")
    dense = unpack_weight(weight.to("meta"), scale.half().to("meta"), 9)
    assert (dense.shape, dense.dtype, dense.device.type) == ((4, 9), torch.float16, "meta")


def test_autocast_does_not_reach_into_the_op():
    """Sums stay in single precision: what a kernel computes must not depend on the context it is called in."""
    weight, scale, bias, _ = layer(8, 65, torch.float32)
    x = torch.randn(4, 65)
    outside = linear_w1(x, weight, scale, bias)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            inside = linear_w1(x, weight, scale, bias)
        torch.testing.assert_close(inside.to(outside.dtype), outside, rtol=1e-6, atol=1e-6)


@biases
def test_compiles_whole_with_gradients(with_bias):
    torch.compiler.reset()
    weight, scale, bias, _ = layer(5, 11)
    x = torch.randn(3, 11, dtype=torch.float64)
    results = []
    for function in (linear_w1, torch.compile(linear_w1, fullgraph=True, backend="aot_eager")):
        leaf, shift = x.clone().requires_grad_(), bias.clone().requires_grad_() if with_bias else None
        output = function(leaf, weight, scale, shift)
        output.square().sum().backward()
        results.append((output.detach(), leaf.grad, shift.grad if with_bias else None))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-13)


class _Layer(torch.nn.Module):
    def __init__(self, weight, scale, bias):
        super().__init__()
        self.weight, self.scale, self.bias = weight, scale, bias

    def forward(self, x):
        return linear_w1(x, self.weight, self.scale, self.bias)


@biases
def test_exports_as_one_node_for_any_batch(with_bias):
    weight, scale, bias, _ = layer(5, 11, torch.float32)
    module = _Layer(weight, scale, bias if with_bias else None)
    program = torch.export.export(
        module, (torch.randn(3, 11),), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}}
    )
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [
        torch.ops.proxbit.linear_w1.default
    ]
    x = torch.randn(7, 11)
    assert torch.equal(program.module()(x), module(x))


@pytest.mark.parametrize(
    ("shape", "rows"), [((11,), 5), ((4, 11), 5), ((2, 3, 7), 6), ((2, 0, 8), 3), ((1, 65), 1)], ids=str
)
def test_flops_are_those_of_the_dense_layer(shape, rows):
    weight, scale, _, _ = layer(rows, shape[-1], torch.float32)
    counter, dense = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with counter:
        linear_w1(torch.randn(shape), weight, scale)
    positions = int(np.prod(shape[:-1]))
    assert counter.get_total_flops() == 2 * positions * shape[-1] * rows
    with dense:
        torch.nn.functional.linear(torch.randn(shape), torch.randn(rows, shape[-1]))
    assert counter.get_total_flops() == dense.get_total_flops()


def test_kernel_name():
    weight, scale, _, _ = layer(4, 9, torch.float32)
    assert linear_kernel(weight, scale) == (native().name if native() else "reference")
    assert linear_kernel(weight, scale.bfloat16()) == linear_kernel(weight, scale)
    for elsewhere in ((weight, scale.double()), (weight, scale.half()), (weight.to("meta"), scale)):
        assert linear_kernel(*elsewhere) == "reference"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight": torch.zeros(5, 2, dtype=torch.int32)}, r"uint8 \[rows, bytes\], not torch.int32 \[5, 2\]"),
        ({"weight": torch.zeros(2, dtype=torch.uint8)}, r"uint8 \[rows, bytes\], not torch.uint8 \[2\]"),
        ({"scale": torch.ones(1)}, r"scale must be one number a row, \[5\], not \[1\]"),
        ({"bias": torch.ones(5, 1)}, r"bias must be one number a row, \[5\], not \[5, 1\]"),
    ],
    ids=["dtype", "dimensions", "scale", "bias"],
)
def test_wrong_tensors_beside_the_input(changes, words, device):
    """On the meta device as on the CPU: a trace must not accept what a run refuses."""
    weight, scale, bias, _ = layer(5, 11, torch.float32)
    tensors = {"x": torch.ones(3, 11), "weight": weight, "scale": scale, "bias": bias} | changes
    with pytest.raises(PackedFormatError, match=words):
        linear_w1(**{name: tensor.to(device) for name, tensor in tensors.items()})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_grid_is_three_numbers(device):
    weight, scale, bias, _ = layer(5, 11, torch.float32)
    tensors = [tensor.to(device) for tensor in (torch.ones(3, 11), weight, scale, bias, torch.ones(11))]
    with pytest.raises(PackedFormatError, match=r"grid must be step, smallest and largest code, \[3\], not \[11\]"):
        linear_w1a8(*tensors)


def test_flops_of_the_backward():
    """Forward and gradient of the input: two products of 3 x 11 -> 5."""
    weight, scale, bias, _ = layer(5, 11, torch.float32)
    x = torch.ones(3, 11, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        linear_w1(x, weight, scale, bias).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 3 * 11 * 5)


def test_whoever_watches_sees_the_operator():
    """Outside of training a call goes past torch's dispatcher, unless somebody would miss it."""
    weight, scale, bias, _ = layer(5, 11, torch.float32)
    x = torch.randn(3, 11)
    expected = linear_w1(x, weight, scale, bias)
    with torch.profiler.profile() as profile:
        linear_w1(x, weight, scale, bias)
    assert "proxbit::linear_w1" in {event.key for event in profile.key_averages()}
    with FlopCounterMode(display=False) as counter:
        linear_w1(x, weight, scale, bias)
    assert counter.get_total_flops() == 2 * 3 * 11 * 5
    graph = make_fx(lambda x: linear_w1(x, weight, scale, bias))(x)
    assert torch.ops.proxbit.linear_w1.default in [node.target for node in graph.graph.nodes]
    mapped = torch.vmap(lambda row: linear_w1(row, weight, scale, bias))(x)
    torch.testing.assert_close(mapped, expected, rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(linear_w1(x, weight, scale, bias), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7,), (0, 5), (3, 0), (2, 3, 40)], ids=str)
def test_rounded_activations(shape, dtype):
    """Compiled or not, recorded or not: the same numbers, without a gradient."""
    x = torch.randn(shape).to(dtype).requires_grad_()
    q, step = reference.quantize_activations(x.detach())
    result = round_activations(x)
    assert torch.equal(result, (q * step).to(dtype)) and not result.requires_grad
    assert torch.equal(make_fx(round_activations)(x)(x), result)
    assert torch.equal(round_activations(x.detach().expand(2, *shape)), result.expand(2, *shape))
