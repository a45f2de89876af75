"""Triton kernels for latent weights: their values, on the interpreter; that they compile; and when they are used."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from latent_rows import assert_last_digits, assert_weight_and_gradient, latent_of, number
from proxbit.kernels import LatentRows, backend_for, dispatch, native, triton
from proxbit.kernels.interface import FUNCTIONS
from proxbit.kernels.triton import latents as kernels
from proxbit.quantizers import get_pair, quantize
from triton_interpreter import assembly, interpreter_process

MU = 1.7
mu = number(MU)
function = pytest.mark.parametrize("function", FUNCTIONS)


@pytest.fixture(scope="module")
def interpret():
    """The functions of `triton` on the interpreter, of tensors on the CPU."""
    with interpreter_process() as run:
        yield SimpleNamespace(
            **{name: partial(run, getattr(triton, name)) for name in ("quantize_rows", "gradient_rows")}
        )


@function
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 1500)], ids=str)
def test_weight_and_gradient(interpret, function, shape):
    assert_weight_and_gradient(interpret, function, shape)


@function
def test_values_to_the_last_digits(interpret, function):
    assert_last_digits(interpret, function, MU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(interpret, dtype):
    """Sums are taken in fp32, and what comes of them is rounded once."""
    latent, grad = latent_of((3, 70)).to(dtype), torch.randn(3, 70).to(dtype)
    weight, divisor, factor = interpret.quantize_rows(LatentRows("sign-swish", latent, mu), "ls")
    given = LatentRows("sign-swish slope", latent, mu, divisor, factor)
    made = interpret.gradient_rows(given, grad)
    assert (weight.dtype, made.dtype, divisor.dtype, factor.dtype) == (dtype, dtype, torch.float32, torch.float32)
    for one, other in (
        (weight, interpret.quantize_rows(LatentRows("sign-swish", latent.float(), mu), "ls")[0]),
        (made, interpret.gradient_rows(given._replace(latent=latent.float()), grad.float())),
    ):
        torch.testing.assert_close(one, other.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@function
def test_rows_that_are_zero_or_no_numbers(interpret, function):
    latent = latent_of((4, 9))
    latent[1], latent[2, 5] = 0.0, torch.nan
    weight, divisor, factor = interpret.quantize_rows(LatentRows(function, latent, mu), "ls")
    made = interpret.gradient_rows(LatentRows(function, latent, mu, divisor, factor), torch.ones(4, 9))
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
    assert "st.global" in assembly(kernels._quantize, capability, pointers, modes)
    modes = {"FUNCTION": function, "CHUNK": 1024}
    assert "st.global" in assembly(kernels._gradient, capability, pointers | {"grad_ptr": "*bf16"}, modes)


def test_they_are_used_on_a_gpu_only(monkeypatch):
    """What is said to be on a GPU goes there; all else stays with the library, or with torch."""
    latent = torch.randn(4, 6)
    assert backend_for("quantize_rows", latent) is native()
    assert not triton.takes("quantize_rows", (latent,))
    monkeypatch.setattr(triton, "runs_on", lambda device: True)
    assert triton.takes("quantize_rows", (latent,))
    for other in (latent.double(), latent.t(), latent[:0], torch.complex(latent, latent).conj().imag):
        assert not triton.takes("quantize_rows", (other,))
    calls = []
    monkeypatch.setattr(triton, "quantize_rows", lambda rows, scale: calls.append(rows.function) or (rows.latent,) * 3)
    monkeypatch.setattr(dispatch, "native", lambda: triton)  # which a tensor on a GPU leads to
    quantize(latent, mu, get_pair("bnn++"))
    assert calls == ["sign-swish"]


def test_mu_is_read_without_an_operator_that_waits():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        assert kernels._number(mu) == MU
    assert not [event.key for event in run.key_averages() if "item" in event.key or "_local_scalar" in event.key]
