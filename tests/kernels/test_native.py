"""The compiled kernels, at every ISA that this machine runs, against the plain torch reference."""

import copy
import gc
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import proxbit.kernels
from proxbit.analysis.timing import torch_threads
from proxbit.errors import ConfigError
from proxbit.kernels import (
    LatentRows,
    Levels,
    LinearCall,
    Norm,
    linear_w1,
    linear_w1a1,
    linear_w1a8,
    native,
    reference,
)
from proxbit.kernels.cpu import choose, isas
from proxbit.kernels.interface import FORMATS, find_library
from proxbit.kernels.memory import is_plain
from proxbit.packing import pack_signs, unpack_signs
from proxbit.quantizers import hard_rows

LIBRARY = find_library(proxbit.kernels.__path__)
ISAS = isas(LIBRARY) if LIBRARY else {}
DTYPES = [torch.float32, torch.bfloat16]
isa = pytest.mark.parametrize("isa", ISAS.values(), ids=list(ISAS))


def layer(rows, columns):
    return pack_signs(torch.randn(rows, columns)), torch.rand(rows) + 0.5, torch.randn(rows)


def assert_as_reference(isa, call):
    """Whole numbers are summed exactly, so that results are equal; sums of floats may be taken in another order."""
    result, x = isa.linear(call), call.x
    assert (result.shape, result.dtype) == ((*x.shape[:-1], len(call.weight)), x.dtype)
    if call.activations != "float":
        torch.testing.assert_close(result, reference.linear(call), rtol=0, atol=0, equal_nan=True)
        return
    scale, bias = call.scale.double(), torch.zeros(()) if call.bias is None else call.bias.double()
    exact = reference.linear(LinearCall("float", x.double(), call.weight, scale, bias))
    size = x.double().abs().sum(-1, keepdim=True) * scale + bias.abs()
    rounding = 1e-6 if x.dtype == torch.float32 else 1 / 256
    assert bool(((result.double() - exact).abs() <= rounding * size).all())


def assert_all_as_reference(isa, x, weight, scale, bias):
    """On every format of activations."""
    for activations in FORMATS:
        assert_as_reference(isa, LinearCall(activations, x, weight, scale, bias))


def test_this_installation_has_its_kernels_and_uses_the_fastest():
    """Where a compiler is at hand, nothing may quietly run on the reference."""
    assert LIBRARY is not None, "proxbit was installed without its compiled kernels"
    assert "portable" in ISAS
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    assert ("avx2" in ISAS) == ("avx2" in flags and "fma" in flags)
    common = {"avx512bw", "avx512vl", "avx512dq"}
    vbmi = {"avx512_vpopcntdq", "avx512vbmi"}
    amx = vbmi | {"amx_tile", "amx_int8", "amx_bf16"}
    for name, needed in (("amx", amx), ("avx512", vbmi), ("avx512vnni", {"avx512_vnni"})):
        assert (name in ISAS) == (common | needed).issubset(flags)
    if "PROXBIT_ISA" not in os.environ:
        assert native().name == next(iter(ISAS))


def test_the_ops_do_not_run_on_the_reference(monkeypatch):
    def fail(call):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "linear", fail)
    weight, scale, bias = layer(8, 64)
    for op in (linear_w1, linear_w1a8, linear_w1a1):
        for dtype in (torch.float32, torch.bfloat16):
            op(torch.randn(2, 64).to(dtype), weight, scale, bias)
    with pytest.raises(AssertionError, match="the reference ran"):
        linear_w1(torch.randn(2, 64).double(), weight, scale, bias)


@isa
@pytest.mark.parametrize(
    ("columns", "rows"),
    [(1, 193), (7, 64), (8, 1), (9, 65), (63, 7), (64, 192), (65, 8), (191, 9), (193, 63), (1001, 191)],
)
def test_shapes(isa, columns, rows):
    weight, scale, bias = layer(rows, columns)
    for count in (0, 1, 2, 3, 7, 9) if rows < 100 else (5,):
        assert_all_as_reference(isa, torch.randn(count, columns), weight, scale, bias)


@isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_at_the_edges(isa, dtype):
    """Zeros of both signs, rows that saturate, tiny and huge numbers, with and without a bias."""
    columns = 777
    x = torch.randn(9, columns)
    x[0] = 0.0
    x[1] = -0.0
    x[2] = 127.0
    x[3] = torch.where(torch.arange(columns) % 2 == 0, 5.0, -5.0)
    x[4, 5:] = 0.0
    x[5] *= 1e-32
    x[6] *= 1e30
    x[7] = -1.0
    for rows, batch in ((1, x), (70, x.repeat(5, 1))):
        weight, scale, bias = layer(rows, columns)
        for shift in (bias, None):
            assert_all_as_reference(isa, batch.to(dtype), weight, scale, shift)


@isa
def test_every_sum_of_a_saturated_row_fits(isa):
    """All weights and all activations of one sign: the largest sums there are."""
    for columns in (252, 256, 258, 512, 4096):
        weight = pack_signs(torch.ones(3, columns))
        weight[1] = 0
        x = torch.ones(44, columns)
        x[1:] = -3.0
        assert_all_as_reference(isa, x, weight, torch.ones(3), None)


@isa
@pytest.mark.parametrize(("value", "count"), [(float("nan"), 5), (float("inf"), 45), (-float("inf"), 5)])
def test_a_row_that_is_not_finite_spoils_no_other_row(isa, value, count):
    weight, scale, bias = layer(33, 70)
    x = torch.randn(count, 70)
    x[2, 3] = value
    result = isa.linear(LinearCall("int8", x, weight, scale, bias))
    assert bool(result[2].isnan().all())
    others = [row for row in range(count) if row != 2]
    assert torch.equal(result[others], reference.linear(LinearCall("int8", x[others], weight, scale, bias)))
    assert_as_reference(isa, LinearCall("sign", x, weight, scale, bias))


@isa
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -1e38])
def test_what_is_huge_is_huge_in_every_batch(isa, value):
    """Of floats, an infinity stays one, and what has a finite sum is finite: one row alone, or among others."""
    weight, scale = pack_signs(torch.randn(200, 96)), torch.full((200,), 0.01)
    x = torch.zeros(9, 96)
    x[:, 0], x[3:6, 50], x[6:, 95] = value, 1.0, -2.0
    x = x.repeat(5, 1)
    for batch in (x, x.bfloat16()):
        expected = reference.linear(LinearCall("float", batch, weight, scale))
        for count in (1, 3, 4, 9, 45):
            result = isa.linear(LinearCall("float", batch[:count], weight, scale))
            torch.testing.assert_close(result, expected[:count], equal_nan=True)


@isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_no_cache_holds(isa, dtype):
    """Rows and inputs beyond what is laid out at once, and none at all."""
    for count, columns, rows in ((70, 6500, 70), (130, 3100, 33), (40, 0, 3)):
        assert_all_as_reference(isa, torch.randn(count, columns).to(dtype), *layer(rows, columns))


@isa
@pytest.mark.parametrize(
    ("bounds", "dtype"),
    [
        ((-8.0, 7.0), torch.float32),
        ((0.0, 15.0), torch.bfloat16),
        ((-127.0, 127.0), torch.bfloat16),
        ((-1e9, 1e9), torch.float32),
        ((3.0, -3.0), torch.float32),
    ],
    ids=str,
)
def test_whole_numbers_on_a_grid(isa, bounds, dtype):
    """Four bits and whole bytes, one step for all rows: halves, what is clipped, and what is no number."""
    grid = torch.tensor([0.25, *bounds])
    for count, columns, rows in ((1, 48, 20), (2, 0, 3), (11, 77, 33), (40, 192, 130), (7, 1001, 3)):
        weight, scale, bias = layer(rows, columns)
        x = torch.randn(count, columns).to(dtype)
        x[0] = (torch.arange(columns) - 20) / 8
        if count > 6:
            x[1, 3], x[2, 0], x[3, 5] = torch.nan, torch.inf, -torch.inf
            x[4], x[5] = 1e30, -1e30
        call = LinearCall("int8", x, weight, scale, bias, grid)
        assert_as_reference(isa, call)
        assert count < 7 or isa.linear(call).isnan().any(dim=1).nonzero().flatten().tolist() == [1]
    for step in (0.0, torch.nan, torch.inf):
        grid[0] = step
        assert_as_reference(isa, call)


@isa
@pytest.mark.parametrize(
    ("count", "columns", "rows", "dtype"),
    [(1, 48, 20, torch.bfloat16), (3, 67, 33, torch.float32), (40, 100, 200, torch.bfloat16), (2, 1, 3, torch.float32)],
)
def test_layer_norm_before_the_sums(isa, count, columns, rows, dtype):
    """To the rounding of fp32; of int8, to a level of a few activations that lie between two."""
    weight, scale, bias = layer(rows, columns)
    # No normalized value is so near zero that rounding could turn its sign.
    x = (torch.randn(count, columns).sign() * (torch.rand(count, columns) + 1) + 0.01).to(dtype)
    norm = Norm(torch.rand(columns) + 0.5, torch.randn(columns) * 0.01, 1e-6)
    size = norm(x).abs().sum(-1, keepdim=True) * scale + bias.abs()
    for activations, rounding in (("float", 2e-6), ("int8", 1e-3), ("sign", 1e-6)):
        call = LinearCall(activations, x, weight, scale, bias, norm=norm)
        fused = isa.linear(call)
        apart = reference.linear(call._replace(x=x.double()))
        assert fused.dtype == dtype
        bound = (rounding + (0 if dtype == torch.float32 else 1 / 256)) * size
        assert bool(((fused.double() - apart).abs() <= bound).all())
        plain = isa.linear(call._replace(norm=None))
        assert activations == "sign" or columns == 1 or not torch.allclose(plain, fused)


@isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_behind_the_sums(isa, dtype):
    """To the rounding of fp32, from far below zero to far above."""
    weight, _, bias = layer(300, 40)
    scale = torch.logspace(-3, 1, 300)
    x = torch.randn(5, 40).to(dtype)
    for activations in FORMATS:
        call = LinearCall(activations, x, weight, scale, bias)
        fused = isa.linear(call._replace(gelu=True))
        apart = torch.nn.functional.gelu(isa.linear(call._replace(x=x.float())).double())
        assert fused.dtype == dtype
        error, rounding = (fused.double() - apart).abs(), 3e-7 if dtype == torch.float32 else 1 / 256
        assert bool((error <= rounding * apart.abs().clamp(min=1e-2) + 1e-7).all())


@isa
def test_thresholds(isa):
    for columns, dtype in ((8, torch.bfloat16), (65, torch.float32)):
        threshold, x = torch.randn(columns), torch.randn(6, columns)
        x[1] = threshold
        assert_as_reference(isa, LinearCall("sign", x.to(dtype), *layer(40, columns), threshold))


@isa
def test_views(isa):
    """Inputs with strides and offsets, a weight that is a part of another."""
    weight, scale, bias = layer(90, 72)
    base = torch.randn(7, 200, 8)
    for x in (base.transpose(1, 2)[..., :72], base.flatten()[5 : 5 + 3 * 72].view(3, 72), base[:, 100:172, 3]):
        assert_all_as_reference(isa, x, weight, scale, bias)
    assert_all_as_reference(isa, torch.randn(72).expand(4, 72), weight[11:75], scale[11:75], bias[11:75])
    assert_all_as_reference(isa, torch.randn(2, 72), weight[1::3], scale[1::3], bias[1::3])


@isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_and_unpacking(isa, dtype):
    for rows, columns in [(1, 1), (3, 7), (2, 8), (5, 9), (4, 63), (3, 64), (2, 65), (7, 1030), (0, 5), (600, 300)]:
        values = torch.randn(rows, columns)
        values[values.abs() < 0.1] = -0.0
        values[values.abs() > 2.5] = torch.nan
        values = values.to(dtype)
        for view in (values, values[::2], values[:, ::2]):
            packed = isa.pack_signs(view)
            assert torch.equal(packed, pack_signs(view))
            found = isa.unpack_signs(packed, view.shape[1], dtype)
            assert torch.equal(found, unpack_signs(packed, view.shape[1], dtype)) and found.dtype == dtype


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(list(ISAS)),
    st.sampled_from(FORMATS),
    st.integers(0, 40),
    st.integers(1, 700),
    st.integers(1, 300),
    st.sampled_from([1, 2, 3, 5]),
    st.integers(0, 2**31),
)
def test_any_shape_on_any_number_of_threads(isa, activations, count, columns, rows, threads, seed):
    torch.manual_seed(seed)
    weight, scale, bias = layer(rows, columns)
    x = torch.randn(count, columns) * 10 ** float(torch.randn(()))
    call = LinearCall(activations, x, weight, scale, bias)
    alone = ISAS[isa].linear(call)
    with torch_threads(threads):
        assert_as_reference(ISAS[isa], call)
        together = ISAS[isa].linear(call)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


@isa
@pytest.mark.parametrize(("count", "rows"), [(197, 192), (2, 3072)])
def test_threads_give_the_same_result(isa, count, rows):
    weight, scale, bias = layer(rows, 768)
    for activations in FORMATS:
        call, results = LinearCall(activations, torch.randn(count, 768), weight, scale, bias), []
        for threads in (1, 2, 3):
            with torch_threads(threads):
                results.append(isa.linear(call))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
def test_the_defaults_of_torch_change_nothing(isa, dtype):
    """The library writes floats of four bytes, whatever a new tensor of torch is by default, and wherever."""
    latent, x = torch.randn(40, 100), torch.randn(20, 100)
    scale, grad, mu = torch.tensor([0.5]), torch.randn(20, 100), torch.tensor(3.0)

    def everything():
        bits = isa.pack_signs(latent)
        gradient, values = grad.clone(), torch.empty_like(x)
        return (
            bits,
            isa.unpack_signs(bits, 100, torch.float32),
            isa.linear(LinearCall("float", x, bits, latent[:, 0])),
            *isa.quantize_rows(LatentRows("sign-swish", latent, mu), "ls"),
            *isa.level_gradient(Levels("grid", codes=(-8, 7)), x, scale, None, values, gradient),
            gradient,
            hard_rows(latent, normalize="row", scale="ls").scale,
        )

    expected = everything()
    defaults = torch.device("meta") if dtype == "meta" else default_dtype(dtype)
    with defaults:
        found = everything()
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_a_weight_that_changes_is_laid_out_anew():
    """In place, by load_state_dict, and as a copy: never the signs of another weight."""
    weight, scale, bias = layer(20, 64)
    other = pack_signs(torch.randn(20, 64))
    x = torch.randn(3, 64)
    for op in (linear_w1, linear_w1a8, linear_w1a1):
        signs = weight.clone()
        before = op(x, signs, scale, bias)
        twin = copy.deepcopy(signs)
        signs.copy_(other)
        assert torch.equal(op(x, signs, scale, bias), op(x, other, scale, bias))
        assert torch.equal(op(x, twin, scale, bias), before)
        with torch.inference_mode():
            made_there = weight.clone()
            assert torch.equal(op(x, made_there, scale, bias), before)
            made_there.copy_(other)
            assert torch.equal(op(x, made_there, scale, bias), op(x, other, scale, bias))


def test_layouts_live_as_long_as_their_weight():
    kernels = native()
    gc.collect()
    before = len(kernels.tiles)
    weight, scale, bias = layer(64, 64)
    linear_w1a8(torch.randn(2, 64), weight, scale, bias)
    assert len(kernels.tiles) <= before + 1
    del weight
    gc.collect()
    assert len(kernels.tiles) <= before


def test_several_models_in_several_threads():
    layers = [(*layer(130, 200), torch.randn(30, 200)) for _ in range(8)]
    expected = [reference.linear(LinearCall("int8", x, *numbers)) for *numbers, x in layers]

    def work(index):
        weight, scale, bias, x = layers[index % len(layers)]
        return all(torch.equal(linear_w1a8(x, weight, scale, bias), expected[index % len(layers)]) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(32)))


def _in_a_child(connection, layer_and_input):
    weight, scale, bias, x = layer_and_input
    connection.send(linear_w1a8(x, weight, scale, bias).tolist())


def test_after_a_fork():
    """As in the workers of a data loader, after the parent used its threads."""
    weight, scale, bias = layer(300, 512)
    x = torch.randn(64, 512)
    expected = linear_w1a8(x, weight, scale, bias)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_in_a_child, args=(theirs, (weight, scale, bias, x)))
    child.start()
    assert ours.poll(60)
    assert torch.equal(torch.tensor(ours.recv()), expected)
    child.join(60)
    assert child.exitcode == 0


def test_the_environment_chooses_the_isa():
    for name, kernels in ISAS.items():
        assert choose(LIBRARY, {"PROXBIT_ISA": name}).isa == kernels.isa
    assert choose(LIBRARY, {"PROXBIT_ISA": "reference"}) is None
    assert choose(LIBRARY, {}).name == next(iter(ISAS))
    with pytest.raises(ConfigError, match=r"PROXBIT_ISA is 'sse9'; .* run: .*portable, reference"):
        choose(LIBRARY, {"PROXBIT_ISA": "sse9"})


def test_without_a_library_the_reference_runs_and_says_so():
    assert find_library(["/nowhere"]) is None
    with pytest.warns(UserWarning, match="installed without its compiled kernels"):
        assert choose(None, {}) is None


def test_a_process_runs_the_isa_it_is_told():
    code = "import torch, proxbit.kernels as k; n = k.native(); print(n.name if n else 'reference')"
    environment = {**os.environ, "PROXBIT_ISA": "portable"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["portable"]


def test_which_tensors_the_library_reads_as_they_are():
    latent = torch.randn(4, 6)
    memory = torch.zeros(101, dtype=torch.uint8)
    shifted = torch.frombuffer(bytearray(memory.numpy()), dtype=torch.float32, offset=1, count=24).view(4, 6)
    others = [latent.t(), latent.double(), latent.bfloat16(), latent.to("meta"), latent[:0], latent[:, :0], shifted]
    others += [torch.complex(latent, latent).conj().imag.contiguous().new_zeros(4, 6).as_subclass(Tagged)]
    assert is_plain(latent) and is_plain(torch.nn.Parameter(latent)) and is_plain(latent[1:])
    assert not any(is_plain(other) for other in others)


class Tagged(torch.Tensor):
    """A tensor that may compute in its own way."""
