"""Triton kernels for latent weights: their values, on the interpreter; that they compile; and when they are used."""

from functools import partial

import pytest
import torch

from latent_rows import assert_last_digits, assert_weight_and_gradient, latent_of, number
from proxbit.kernels import latent_kernels, latents, quantizer, triton_linear, triton_quantizer
from proxbit.kernels.interface import FUNCTIONS
from proxbit.quantizers import get_pair, quantize
from triton_interpreter import assembly, interpreter_process

MU = 1.7
mu = number(MU)
function = pytest.mark.parametrize("function", FUNCTIONS)


@pytest.fixture(scope="module")
def interpret():
    """Functions of `triton_quantizer` on the interpreter, of tensors on the CPU."""
    with interpreter_process() as run:
        yield lambda name, *arguments: run(getattr(triton_quantizer, name), *arguments)


@function
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 1500)], ids=str)
def test_weight_and_gradient(interpret, function, shape):
    made = partial(interpret, "quantize_rows"), partial(interpret, "gradient_rows")
    assert_weight_and_gradient(*made, function, shape)


@function
def test_values_to_the_last_digits(interpret, function):
    assert_last_digits(partial(interpret, "quantize_rows"), function, MU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(interpret, dtype):
    """Sums are taken in fp32, and what comes of them is rounded once."""
    latent, grad = latent_of((3, 70)).to(dtype), torch.randn(3, 70).to(dtype)
    weight, divisor, factor = interpret("quantize_rows", "sign-swish", latent, mu, "ls", None, None)
    made = interpret("gradient_rows", "sign-swish slope", latent, mu, divisor, factor, grad)
    assert (weight.dtype, made.dtype, divisor.dtype, factor.dtype) == (dtype, dtype, torch.float32, torch.float32)
    for one, other in (
        (weight, interpret("quantize_rows", "sign-swish", latent.float(), mu, "ls", None, None)[0]),
        (made, interpret("gradient_rows", "sign-swish slope", latent.float(), mu, divisor, factor, grad.float())),
    ):
        torch.testing.assert_close(one, other.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@function
def test_rows_that_are_zero_or_no_numbers(interpret, function):
    latent = latent_of((4, 9))
    latent[1], latent[2, 5] = 0.0, torch.nan
    weight, divisor, factor = interpret("quantize_rows", function, latent, mu, "ls", None, None)
    made = interpret("gradient_rows", function, latent, mu, divisor, factor, torch.ones(4, 9))
    assert not weight[1].any() and bool(weight[2].isnan().all()) and bool(made[2].isnan().all())
    assert bool(weight[[0, 1, 3]].isfinite().all()) and bool(made[[0, 1, 3]].isfinite().all())


@function
@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile_for_gpus(function, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {
        "latent_ptr": "*bf16",
        "divisor_ptr": "*fp32",
        "factor_ptr": "*fp32",
        "result_ptr": "*bf16",
        "mu": "fp32",
    }
    modes = {"FUNCTION": function, "DIVISOR": "mean", "FACTOR": "ls", "CHUNK": 1024}
    assert "st.global" in assembly(triton_quantizer._quantize, capability, pointers, modes)
    modes = {"FUNCTION": function, "CHUNK": 1024}
    assert "st.global" in assembly(triton_quantizer._gradient, capability, pointers | {"grad_ptr": "*bf16"}, modes)


def test_they_are_used_on_a_gpu_only(monkeypatch):
    """What is said to be on a GPU goes there; all else stays with the library, or with torch."""
    latent = torch.randn(4, 6)
    assert latent_kernels(latent).quantize.func is quantizer.quantize_rows
    monkeypatch.setattr(triton_linear, "_runs_on", lambda device: True)
    assert latent_kernels(latent) == (triton_quantizer.quantize_rows, triton_quantizer.gradient_rows)
    for other in (latent.double(), latent.t(), latent[:0], torch.complex(latent, latent).conj().imag):
        assert not triton_quantizer.takes(other)
    calls = []
    monkeypatch.setattr(triton_quantizer, "quantize_rows", lambda *given: calls.append(given[0]) or given[1:2] * 3)
    quantize(latent, mu, get_pair("bnn++"))
    assert calls == ["sign-swish"]
    monkeypatch.setattr(latents, "triton_quantizer", None)
    assert latent_kernels(latent).quantize.func is quantizer.quantize_rows


def test_mu_is_read_without_an_operator_that_waits():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        assert triton_quantizer._number(mu) == MU
    assert not [event.key for event in run.key_averages() if "item" in event.key or "_local_scalar" in event.key]
