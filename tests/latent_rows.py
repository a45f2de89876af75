"""What compiled quantizers of latent weights must compute, whatever they run on."""

import numpy as np
import torch

from pair_formulas import ROWS
from proxbit.kernels import LatentRows
from proxbit.kernels.interface import FUNCTIONS
from proxbit.quantizers import get_pair

KNOWN = {
    side.compiled: formula
    for name, row in ROWS.items()
    for side, formula in zip((get_pair(name).forward, get_pair(name).backward), row[:2], strict=True)
}
# Of each compiled function, in numpy.
FORMULAS = {name: KNOWN[name] for name in FUNCTIONS}


def number(mu):
    return torch.tensor(mu, dtype=torch.float64)


def latent_of(shape):
    """Rows of different sizes, each with zeros where it is long enough."""
    latent = torch.randn(shape) * torch.logspace(-3, 2, shape[0]).unsqueeze(1)
    latent[:, 2:4] = 0.0
    return latent


def assert_weight_and_gradient(backend, function, shape, mu=1.7):
    """Of `quantize_rows` and `gradient_rows`: found divisors and factors, and the same ones given."""
    rows, grad = LatentRows(function, latent_of(shape), number(mu)), torch.randn(shape)
    w = rows.latent.double().numpy()
    s = np.abs(w).mean(axis=1, keepdims=True)
    q = FORMULAS[function](w / s, mu)
    energy = np.maximum((q * q).sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    least = (q * w).sum(axis=1, keepdims=True) / energy
    sums = 3e-6 * np.abs(q * w).sum(axis=1, keepdims=True) / energy
    for scale, a in (("ls", least), ("fixed", s)):
        weight, divisor, factor = backend.quantize_rows(rows, scale)
        assert weight.shape == shape and divisor.shape == factor.shape == (shape[0], 1)
        np.testing.assert_allclose(divisor.double().numpy(), s, rtol=1e-6)
        assert (np.abs(factor.double().numpy() - a) <= sums + 1e-6 * np.abs(a)).all()
        size = float(np.abs(q).max() + 1)
        assert (np.abs(weight.double().numpy() - q * a) <= (sums + 3e-6 * np.abs(a)) * size).all()
        given = rows._replace(divisor=divisor, factor=factor)
        assert torch.equal(backend.quantize_rows(given, scale)[0], weight)
        made = backend.gradient_rows(given, grad)
        assert torch.equal(backend.gradient_rows(given, grad.clone(), True), made)
        gain = (factor / divisor).double().numpy()
        near = 1e-5 * float(np.abs(gain).max())
        np.testing.assert_allclose(made.double().numpy(), q * gain * grad.double().numpy(), rtol=3e-6, atol=near)


def assert_last_digits(backend, function, mu):
    """From far below one to far beyond the flat parts, of both signs. Near zero, odd functions are exact."""
    sizes = torch.cat([torch.logspace(-30, 2, 4001), torch.linspace(0, 5, 5001)])
    w, ones = torch.cat([sizes, -sizes]).unsqueeze(0), torch.ones(1, 1)
    value, _, _ = backend.quantize_rows(LatentRows(function, w, number(mu), ones, ones), "ls")
    mu32 = float(torch.tensor(mu))
    expected = FORMULAS[function](np.clip(w.double().numpy(), -700 / mu32, 700 / mu32), mu32)
    exact = function in ("one", "box", "sign")
    largest = float(np.abs(expected).max()) if "series" in function else mu
    near = 5e-7 * largest if "slope" in function else 1e-37
    rounding = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": near}
    np.testing.assert_allclose(value.double().numpy(), expected, **rounding)
