"""The Triton kernels: their values, on Triton's interpreter; what they compile to; and when the operators use them."""

import importlib

import pytest
import torch
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from proxbit.kernels import LinearCall, dispatch, linear_kernel, linear_w1, linear_w1a1, linear_w1a8, reference, triton
from proxbit.kernels.interface import FORMATS
from proxbit.packing import pack_signs
from triton_interpreter import assembly, interpreter_process

# The function of the package has the name of its module.
kernels = importlib.import_module("proxbit.kernels.triton.linear")
SIZES = [(1, 1, 1), (3, 7, 5), (16, 8, 64), (33, 9, 70), (1, 63, 70), (3, 64, 64), (16, 65, 5), (33, 193, 70)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
activations = pytest.mark.parametrize("activations", FORMATS)


@pytest.fixture(scope="module")
def interpret():
    """`triton.linear` on the interpreter, of tensors on the CPU."""
    with interpreter_process() as run:
        yield lambda *arguments: run(triton.linear, LinearCall(*arguments))


def layer(rows, columns):
    return pack_signs(torch.randn(rows, columns)), torch.rand(rows) + 0.5, torch.randn(rows)


def assert_as_reference(result, activations, x, weight, scale, bias, levels=None):
    """Whole numbers are summed exactly, so that results are equal; sums of floats may be taken in another order."""
    assert (result.shape, result.dtype) == ((*x.shape[:-1], len(weight)), x.dtype)
    if activations != "float":
        expected = reference.linear(LinearCall(activations, x, weight, scale, bias, levels))
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        return
    wide = None if bias is None else bias.double()
    exact = reference.linear(LinearCall("float", x.double(), weight, scale.double(), wide))
    size = x.double().abs().sum(-1, keepdim=True) * scale.double() + (0 if bias is None else bias.abs().double())
    rounding = torch.finfo(x.dtype).eps / 2 if x.dtype != torch.float32 else 0
    assert bool(((result.double() - exact).abs() <= 1e-6 * size + rounding * exact.abs() * 1.0001).all())


@dtypes
@activations
def test_shapes(interpret, activations, dtype):
    for tokens, columns, rows in SIZES:
        x, (weight, scale, bias) = torch.randn(tokens, columns).to(dtype), layer(rows, columns)
        for shift in (bias, None) if tokens == 3 else (bias,):
            assert_as_reference(interpret(activations, x, weight, scale, shift), activations, x, weight, scale, shift)


@activations
def test_every_tile(interpret, activations):
    """Token counts for each row of the table of tiles, more columns and rows than one tile has."""
    for tokens in (16, 17, 257):
        x, (weight, scale, bias) = torch.randn(tokens, 140).half(), layer(130, 140)
        assert_as_reference(interpret(activations, x, weight, scale, bias), activations, x, weight, scale, bias)


def test_more_columns_than_one_chunk(interpret):
    x, (weight, scale, bias) = torch.randn(2, 2050), layer(3, 2050)
    x[0, 2049], x[1, 0] = 100.0, -100.0
    threshold = torch.randn(2050)
    assert_as_reference(interpret("int8", x, weight, scale, bias), "int8", x, weight, scale, bias)
    result = interpret("sign", x, weight, scale, bias, threshold)
    assert_as_reference(result, "sign", x, weight, scale, bias, threshold)


@dtypes
def test_whole_numbers_on_a_grid(interpret, dtype):
    x, (weight, scale, bias) = torch.randn(9, 77), layer(20, 77)
    x[3, 4], x[5, 6] = torch.nan, -torch.inf
    x, grid = x.to(dtype), torch.tensor([0.3, -8.0, 7.0])
    result = interpret("int8", x, weight, scale, bias, grid)
    assert_as_reference(result, "int8", x, weight, scale, bias, grid)
    assert result.isnan().any(dim=1).nonzero().flatten().tolist() == [3]


@dtypes
@pytest.mark.parametrize("activations", ["int8", "sign"])
def test_values_at_the_edges(interpret, activations, dtype):
    """Zeros of both signs, halves, tiny and huge numbers, and numbers that are not finite: no row spoils another."""
    x = torch.randn(10, 77)
    x[0], x[1], x[2], x[3] = 0.0, -0.0, 127.0, torch.arange(77) / 2
    x[3, 0] = 127.0
    x[4] *= 1e-32
    x[5] *= 1e30
    x[6, 3], x[7, 5], x[8, 0] = torch.nan, torch.inf, -torch.inf
    x, (weight, scale, bias) = x.to(dtype), layer(20, 77)
    result = interpret(activations, x, weight, scale, bias)
    assert_as_reference(result, activations, x, weight, scale, bias)
    assert bool(result[6:9].isnan().all()) == (activations == "int8")


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=str)
@activations
def test_leading_dimensions(interpret, activations, leading):
    x, (weight, scale, bias) = torch.randn(*leading, 9), layer(5, 9)
    assert_as_reference(interpret(activations, x, weight, scale, bias), activations, x, weight, scale, bias)


@activations
def test_no_rows_and_no_columns(interpret, activations):
    for rows, columns in ((0, 9), (5, 0)):
        x, (weight, scale, bias) = torch.randn(3, columns), layer(rows, columns)
        assert_as_reference(interpret(activations, x, weight, scale, bias), activations, x, weight, scale, bias)


@activations
def test_views(interpret, activations):
    """Inputs with strides and offsets, a weight that is a part of another, parameters of other dtypes."""
    weight, scale, bias = layer(30, 72)
    wide = torch.full((30, 11), 255, dtype=torch.uint8)
    wide[:, 1:-1] = weight
    inputs = (torch.randn(2, 72, 3).transpose(1, 2), torch.randn(72).expand(4, 72), torch.randn(9, 150)[::2, 5:77])
    for x in inputs:
        result = interpret(activations, x, wide[1::3, 1:-1], scale[1::3], bias[1::3])
        assert_as_reference(result, activations, x, weight[1::3], scale[1::3], bias[1::3])
    x, scale, bias = torch.randn(2, 72), scale.half(), bias.double()
    assert_as_reference(interpret(activations, x, weight, scale, bias), activations, x, weight, scale, bias)


@pytest.mark.parametrize(
    ("capability", "dtype", "instruction"),
    [
        (80, "bf16", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
        (80, "i8", "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
        (90, "fp16", "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16"),
        (90, "i8", "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"),
    ],
)
def test_products_are_made_by_tensor_cores(capability, dtype, instruction, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    step = {"step_ptr": "*fp32" if dtype == "i8" else "constexpr"}
    pointers = {"x_ptr": f"*{dtype}", "weight_ptr": "*u8", "scale_ptr": "*fp32", "bias_ptr": "*fp32", "y_ptr": "*bf16"}
    tile = {"SUM": tl.int32 if dtype == "i8" else tl.float32, **kernels._blocks(1576, torch.bfloat16)}
    ptx = assembly(kernels._multiply, capability, pointers | step, tile)
    assert instruction in ptx
    assert "fma.rn.f32" not in ptx, "the epilogue rounds after the product and after the sum"


def test_quantization_rounds_as_ieee_does(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"x_ptr": "*bf16", "q_ptr": "*i8", "step_ptr": "*fp32"}
    ptx = assembly(kernels._round_to_int8, 80, pointers, {"CHUNK": 1024})
    assert ptx.count("div.rn.f32") == 2
    assert "div.full" not in ptx
    assert "fma.rn.f32" not in ptx


@pytest.fixture
def gpu(monkeypatch):
    """Tensors without memory that say they are on a GPU."""
    monkeypatch.setattr(triton, "runs_on", lambda device: device.type == "cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="cuda")


def test_the_operators_use_them_on_a_gpu(gpu, monkeypatch):
    calls = []
    monkeypatch.setattr(triton, "linear", calls.append)
    x, weight, scale = gpu(3, 64), gpu(5, 8, dtype=torch.uint8), gpu(5)
    for activations in FORMATS:
        dispatch.run_linear(LinearCall(activations, x, weight, scale))
        call = calls.pop()
        assert call.activations == activations and call.x is x
    assert linear_kernel(weight, scale) == linear_kernel(weight, scale.half()) == "triton"
    assert linear_kernel(weight, scale.double()) == "reference"


def test_without_triton_a_gpu_runs_the_reference(gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "triton", None)
    monkeypatch.setattr(reference, "linear", lambda call: "the reference ran")
    weight, scale = gpu(5, 8, dtype=torch.uint8), gpu(5)
    assert linear_kernel(weight, scale) == "reference"
    assert dispatch.run_linear(LinearCall("float", gpu(3, 64), weight, scale)) == "the reference ran"


def test_tensors_of_the_cpu_stay_there(monkeypatch):
    monkeypatch.setattr(triton, "linear", None)
    weight, scale, bias = layer(4, 9)
    for op in (linear_w1, linear_w1a8, linear_w1a1):
        assert op(torch.randn(2, 9), weight, scale, bias).shape == (2, 4)
    assert linear_kernel(weight, scale) != "triton"
