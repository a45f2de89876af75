"""Probabilities as zero or a learned scale, against plain re-writes."""

import math

import numpy as np
import pytest
import torch

from proxbit.nn import BinaryProbabilities

ROWS, KEYS, SEEN = 40, 9, 6


def rows(dtype=torch.float64):
    """Of half of them the last keys are masked."""
    scores = 2 * torch.randn(ROWS, KEYS, dtype=dtype)
    scores[ROWS // 2 :, SEEN:] = -torch.inf
    return scores.softmax(dim=-1)


def shares():
    return np.repeat([[1 / KEYS], [1 / SEEN]], ROWS // 2, axis=0)


def quantizer(scale):
    made = BinaryProbabilities(dtype=torch.float64)
    torch.nn.init.constant_(made.scale, scale)
    return made


def test_at_first_a_key_with_its_even_share_is_one():
    p = rows()
    codes, size = BinaryProbabilities()(p)
    assert codes.tolist() == (p.numpy() >= shares() - 1e-12).astype(float).tolist()
    np.testing.assert_allclose(size.detach().numpy(), 2 * shares(), rtol=1e-7)
    assert 0 < float(codes.mean()) < 1


@pytest.mark.parametrize("scale", [0.5, 3.0, -3.0])
def test_values_and_gradients_are_what_the_formula_says(scale):
    """LSQ for the levels 0 and 1: the size gets round(u) - u inside, 1 above, for u = P / size; here through shares and
    the root of the width. P gets 1 inside and 0 above.
    """
    p, made, grad = rows().requires_grad_(), quantizer(scale), torch.randn(ROWS, KEYS, dtype=torch.float64)
    codes, size = made(p)
    (codes * size).backward(grad)
    u = p.detach().numpy() / (abs(scale) * shares())
    expected = (u >= 0.5).astype(float)
    assert codes.detach().numpy().tolist() == expected.tolist()
    np.testing.assert_allclose(size.detach().numpy(), abs(scale) * shares(), rtol=1e-7)
    of_size = np.where(u > 1, 1.0, expected - u) * grad.numpy()
    of_scale = (of_size * shares()).sum() / math.sqrt(KEYS) * np.sign(scale)
    np.testing.assert_allclose(float(made.scale.grad), of_scale, rtol=1e-6)
    np.testing.assert_allclose(p.grad.numpy(), np.where(u > 1, 0.0, 1.0) * grad.numpy(), atol=1e-12)
    assert (u > 1).any() and ((0.5 <= u) & (u < 1)).any()


def test_the_scale_suits_any_number_of_keys():
    """Twice the keys, each with half of the probability: the same are one, with half of the size."""
    p, made = rows(), quantizer(1.7)
    (codes, size), (twice, half) = made(p), made(torch.cat([p, p], dim=1) / 2)
    assert torch.equal(twice, torch.cat([codes, codes], dim=1))
    torch.testing.assert_close(half, size / 2)


def test_calibrated_it_is_the_nearest_of_all_scales():
    """By trying them out, in units of the even share; whatever the shape, and the number of keys."""
    first, second = rows(), rows()[-4:, :SEEN].reshape(2, 2, SEEN)
    made = quantizer(2.0)
    made.calibrate([first, second])
    units = np.concatenate([first.numpy().ravel() / np.repeat(shares(), KEYS), second.numpy().ravel() * SEEN])
    tried = np.linspace(0.2, 8, 2000)
    errors = [np.square(units - s * (units >= s / 2)).sum() for s in tried]
    assert float(made.scale.detach()) == pytest.approx(tried[np.argmin(errors)], abs=0.01)


def test_what_sees_nothing_is_zero():
    made = quantizer(2.0)
    codes, size = made(torch.zeros(3, KEYS, dtype=torch.float64))
    assert float(codes.abs().sum()) == 0 and bool(torch.isfinite(size).all())
    codes, size = made(torch.zeros(0, KEYS, dtype=torch.float64))
    assert codes.shape == (0, KEYS) and size.shape == (0, 1)
