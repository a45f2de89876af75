"""F, B and P of every quantizer pair, written in numpy from the formulas and without the package."""

import math

import numpy as np


def plus_minus(w, mu=None):
    return np.where(w >= 0, 1.0, -1.0)


def identity(w, mu):
    return w


def ones(w, mu):
    return np.ones_like(w)


def linear(w, mu):
    return plus_minus(w) * np.minimum(1, np.abs(w) + mu)


def pull(w, mu):
    """sign(w) (1 + sign(|w| - 1) max(||w| - 1| - mu, 0)), ProxQuant's own."""
    apart = np.abs(w) - 1
    return plus_minus(w) * (1 + np.sign(apart) * np.maximum(np.abs(apart) - mu, 0))


def relax(w, mu):
    return w / (1 + mu) + mu / (1 + mu) * plus_minus(w)


def clip(w, mu):
    return np.minimum(1, np.maximum(-1, mu * w))


def box(w, mu):
    return np.where((w < -1) | (w > 1), 0.0, 1.0)


def swish(w, mu):
    return np.tanh(mu * w / 2) + mu * w / 2 / np.cosh(mu * w / 2) ** 2


def swish_slope(w, mu):
    return mu / np.cosh(mu * w / 2) ** 2 * (1 - mu * w / 2 * np.tanh(mu * w / 2))


def tanh(w, mu):
    return np.tanh(mu * w)


def tanh_slope(w, mu):
    return mu * (1 - np.tanh(mu * w)) * (1 + np.tanh(mu * w))


def decay(w, mu):
    return max(1 / mu, 1) * np.tanh(mu * w)


def decay_slope(w, mu):
    return max(1 / mu, 1) * tanh_slope(w, mu)


def polynomial(w, mu):
    return np.where(np.abs(mu * w) < 1, 2 * mu * w - np.sign(w) * (mu * w) ** 2, plus_minus(w))


def tent(w, mu):
    return np.where(np.abs(mu * w) < 1, 2 * mu - 2 * mu * np.abs(mu * w), 0.0)


def half_period(w, mu):
    return np.minimum(math.pi, np.maximum(-math.pi, w))


def shares(mu):
    """Of each term; a term comes little by little."""
    return np.clip(mu + 1 - np.arange(32), 0, 1)


def series(w, mu):
    w = half_period(w, mu)
    return 4 / math.pi * sum(a * np.sin((2 * i + 1) * w / 2) / (2 * i + 1) for i, a in enumerate(shares(mu)))


def series_slope(w, mu):
    w = half_period(w, mu)
    return 2 / math.pi * sum(a * np.cos((2 * i + 1) * w / 2) for i, a in enumerate(shares(mu)))


def rectified(w, mu):
    size = np.maximum(np.abs(w), 0.1)
    inside = np.where(np.abs(w) <= 0.1, 10 * 0.1 ** (1 / mu), size ** (1 / mu) / size / mu)
    return np.where(np.abs(w) <= 1.5, inside, 0.0)


def triangle(w, mu):
    """Twice the slope of a parabola that is flat at |w| = sqrt(2) / mu."""
    return max(1, 1 / mu) * np.where(np.abs(w) * mu < math.sqrt(2), mu * (math.sqrt(2) - np.abs(w) * mu), 0.0)


def differentiable(w, mu):
    return np.where(np.abs(w) <= 1, tanh_slope(w, mu) / math.tanh(mu), 0.0)


def square_wave(w, mu):
    return plus_minus(np.sin(mu * w))


def sine(w, mu):
    return np.sin(mu * w)


def cosine(w, mu):
    return mu * np.cos(mu * w)


def clip_to_tent(w, mu):
    return np.minimum(1 / mu, np.maximum(-1 / mu, w))


def nearest(w, levels):
    """The nearest of some increasing levels, by comparing all distances; the upper one of two that are as near."""
    downwards = np.array(levels)[::-1]
    return downwards[np.abs(np.asarray(w)[..., None] - downwards).argmin(axis=-1)]


def units(rows, normalize, center):
    """Offset and divisor of each row, `[rows, 1]`."""
    c = np.array([[0.0 if center == "none" else sum(row) / len(row)] for row in rows])
    sizes = np.array([[sum(abs(value) for value in row) / len(row)] for row in rows - c])
    s = {
        "row": sizes,
        "tensor": np.full(sizes.shape, np.abs(rows - c).mean()),
        "std": np.array([[np.std(row)] for row in rows]),
        "none": np.ones(sizes.shape),
    }
    return c, s[normalize]


# name: F, B, P (None for a heuristic pair), the lowest mu, and values of mu to try.
ROWS = {
    "fp": (identity, ones, identity, 0, [1.0]),
    "bc": (plus_minus, ones, plus_minus, 0, [0.0, 3.0]),
    "dorefa": (plus_minus, ones, plus_minus, 0, [1.0]),
    "pc": (linear, ones, linear, 0, [0.0, 0.37, 1.0]),
    "proxquant": (pull, ones, pull, 0, [0.0, 0.37, 1.0]),
    "rpc": (identity, ones, identity, 0, [0.3]),
    "binaryrelax": (relax, ones, relax, 0, [0.0, 0.1, 100.0]),
    "parq": (clip, ones, clip, 1, [1.0, 2.5, 100.0]),
    "md-tanh": (tanh, ones, tanh, 1e-3, [0.3, 5.0]),
    "tanh": (tanh, tanh_slope, identity, 1e-3, [0.3, 5.0]),
    "bnn": (plus_minus, box, None, 0, [0.0, 3.0]),
    "bnn+": (plus_minus, swish_slope, None, 1e-3, [1e-3, 5.0]),
    "bnn++": (swish, swish_slope, identity, 1e-3, [1e-3, 0.3, 30.0]),
    "bireal": (plus_minus, tent, None, 1e-3, [1.0, 2.0]),
    "bireal++": (polynomial, tent, clip_to_tent, 1e-3, [0.2, 1.0, 30.0]),
    "ede": (plus_minus, decay_slope, None, 1e-3, [0.1, 3.0]),
    "ede++": (decay, decay_slope, identity, 1e-3, [0.1, 3.0]),
    "fda": (plus_minus, series_slope, None, 0, [0.0, 9.0]),
    "fda++": (series, series_slope, half_period, 0, [0.0, 9.0, 31.0]),
    "reste": (plus_minus, rectified, None, 1, [1.0, 3.0]),
    "rbnn": (plus_minus, triangle, None, 1e-3, [0.01, 1.0, 10.0]),
    "dsq": (plus_minus, differentiable, None, 1e-3, [1.0, 7.0]),
    "biper": (square_wave, cosine, None, 1e-3, [1.0, 2.3]),
    "biper-sine": (sine, cosine, identity, 1e-3, [1.0, 2.3]),
    "xnor": (plus_minus, box, None, 0, [1.0]),
    "adabin": (plus_minus, decay_slope, None, 1e-3, [0.1, 3.0]),
}
# Row units of their papers, where they are not those of all others.
SCALING = {
    "dorefa": ("tensor", "fixed", "none"),
    "xnor": ("none", "ls", "remove"),
    "adabin": ("std", "fixed", "restore"),
    "rbnn": ("std", "ls", "remove"),
}


def weight_and_gradient(name, rows, upstream, mu, normalize, scale, center, hard):
    """The weight of the forward pass and the gradient of the latent; s and a are numbers, c is the mean of the row."""
    forward, backward, *_ = ROWS[name]
    c, s = units(rows, normalize, center)
    w = rows - c
    q = forward(w / s, mu) if not hard else w / s if name == "fp" else plus_minus(w)
    a = s if scale == "fixed" else (q * w).sum(axis=1, keepdims=True) / (q * q).sum(axis=1, keepdims=True)
    value, slope = a * q, upstream * backward(w / s, mu) * a / s
    if center != "none":
        slope = slope - slope.mean(axis=1, keepdims=True)
    if center == "restore":
        value, slope = value + c, slope + upstream.mean(axis=1, keepdims=True)
    return value, slope
