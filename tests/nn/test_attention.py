"""Attention on int8 and binary operands: against plain re-writes, and against sdpa where it says how things behave."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from proxbit.nn import BinaryProbabilities
from proxbit.nn.attention import binary_attention, int8_attention


def learned_attention(module, *operands, **options):
    """Binary, by a module that has learned its scale."""
    module.add_module("binary_probabilities", BinaryProbabilities())
    nn.init.constant_(module.binary_probabilities.scale, 1.5)
    return binary_attention(module, *operands, **options)


every = pytest.mark.parametrize(
    "attention", [int8_attention, binary_attention, learned_attention], ids=["int8", "binary", "learned"]
)
B, H, L, D = 2, 4, 9, 8


def operands(keys=L, heads=H, dtype=torch.float32):
    torch.manual_seed(0)
    return tuple(torch.randn(B, h, length, D, dtype=dtype) for h, length in ((H, L), (heads, keys), (heads, keys)))


def module(training=False, **attributes):
    made = nn.Identity().train(training)
    made.__dict__.update({"is_causal": False} | attributes)
    return made


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_int8_is_what_its_formula_says():
    """In Python integers, with exact sums."""
    q, k, v = (x.double() for x in operands())
    output, weights = int8_attention(module(), q, k, v, None)
    codes = {}
    for name, x, axis in (("q", q, -1), ("k", k, -1), ("v", v, -2)):
        step = np.abs(x.numpy()).max(axis, keepdims=True) / 127
        codes[name] = (np.rint(x.numpy() / step).astype(np.int64), step)
    (qi, qs), (ki, ks), (vi, vs) = (codes[name] for name in "qkv")
    p = softmax(np.einsum("bhld,bhkd->bhlk", qi, ki) * qs * np.swapaxes(ks, -1, -2) / np.sqrt(D))
    ps = p.max(-1, keepdims=True) / 255
    pi = np.rint(p / ps).astype(np.int64)
    expected = np.einsum("bhlk,bhkd->bhld", pi, vi) * ps * vs
    np.testing.assert_allclose(output.numpy(), expected.swapaxes(1, 2), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(weights.numpy(), pi * ps, rtol=1e-9)
    assert pi.max() == 255 and np.abs(qi).max() == 127


def test_binary_is_what_its_formula_says():
    q, k, v = (x.double() for x in operands())
    output, weights = binary_attention(module(), q, k, v, None)
    signs = [np.where(x.numpy() >= 0, 1, -1) for x in (q, k, v)]
    size = [np.abs(x.numpy()).mean(axis, keepdims=True) for x, axis in ((q, -1), (k, -1), (v, -2))]
    scores = np.einsum("bhld,bhkd->bhlk", signs[0], signs[1]) * size[0] * np.swapaxes(size[1], -1, -2)
    p = softmax(scores / np.sqrt(D))
    b = (p >= 1 / L).astype(np.int64)
    ps = (p * b).sum(-1, keepdims=True) / b.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights.numpy(), b * ps, rtol=1e-9)
    np.testing.assert_allclose(
        output.numpy(), (np.einsum("bhlk,bhkd->bhld", b, signs[2]) * ps * size[2]).swapaxes(1, 2), rtol=1e-9
    )


def test_a_learned_scale_is_that_of_the_module():
    """Of the even share 1 / L; int8 attention has no use for it."""
    q, k, v = (x.double() for x in operands())
    made = module()
    output, weights = learned_attention(made, q, k, v, None)
    signs = [np.where(x.numpy() >= 0, 1, -1) for x in (q, k, v)]
    size = [np.abs(x.numpy()).mean(axis, keepdims=True) for x, axis in ((q, -1), (k, -1), (v, -2))]
    scores = np.einsum("bhld,bhkd->bhlk", signs[0], signs[1]) * size[0] * np.swapaxes(size[1], -1, -2)
    b = softmax(scores / np.sqrt(D)) >= 0.75 / L
    expected = np.einsum("bhlk,bhkd->bhld", b, signs[2]) * 1.5 / L * size[2]
    np.testing.assert_allclose(weights.detach().numpy(), b * 1.5 / L, rtol=1e-6)
    np.testing.assert_allclose(output.detach().numpy(), expected.swapaxes(1, 2), rtol=1e-6)
    assert not torch.equal(binary_attention(module(), q, k, v, None)[1] > 0, weights > 0)
    assert torch.equal(int8_attention(made, q, k, v, None)[0], int8_attention(module(), q, k, v, None)[0])


def test_int8_is_near_sdpa_and_binary_follows_it():
    q, k, v = operands()
    exact = sdpa(q, k, v).transpose(1, 2)
    assert float((int8_attention(module(), q, k, v, None)[0] - exact).norm() / exact.norm()) < 0.02
    binary = binary_attention(module(), q, k, v, None)[0]
    assert float(torch.corrcoef(torch.stack([binary.flatten(), exact.flatten()]))[0, 1]) > 0.5


@pytest.mark.parametrize(
    ("attention", "form"),
    [(int8_attention, "boolean"), (binary_attention, "added"), (learned_attention, "boolean")],
    ids=["int8", "binary", "learned"],
)
def test_masked_keys_are_not_seen(attention, form):
    q, k, v = operands()
    seen = torch.ones(B, 1, 1, L, dtype=torch.bool)
    seen[1, ..., 6:] = False
    mask = seen if form == "boolean" else torch.zeros(B, 1, 1, L).masked_fill(~seen, torch.finfo(torch.float32).min)
    masked, weights = attention(module(), q, k, v, mask)
    alone, _ = attention(module(), q[1:], k[1:, :, :6], v[1:, :, :6], None)
    assert float(weights[1, ..., 6:].abs().max()) == 0
    if attention is int8_attention:  # Steps of channels are taken over all keys.
        torch.testing.assert_close(masked[1:], alone, rtol=0.1, atol=0.05)
    plain, _ = attention(module(), q, k, v, None)
    torch.testing.assert_close(masked[0], plain[0])


@every
def test_a_query_that_may_see_nothing_gets_zeros(attention):
    q, k, v = operands()
    mask = torch.ones(B, 1, L, L, dtype=torch.bool)
    mask[:, :, 3] = False
    result, weights = attention(module(), q, k, v, mask)
    assert torch.equal(result[:, 3], torch.zeros(B, H, D)) and torch.equal(weights[:, :, 3], torch.zeros(B, H, L))
    assert bool(torch.isfinite(result).all())


@every
def test_causal_without_a_mask(attention):
    q, k, v = operands()
    lower = torch.ones(L, L, dtype=torch.bool).tril()[None, None]
    expected = attention(module(), q, k, v, lower)[0]
    torch.testing.assert_close(attention(module(is_causal=True), q, k, v, None)[0], expected)
    torch.testing.assert_close(attention(module(), q, k, v, None, is_causal=True)[0], expected)


@every
def test_grouped_keys_scaling_and_a_bias_of_positions(attention):
    q, k, v = operands(heads=2)
    result = attention(module(num_key_value_groups=2), q, k, v, None, scaling=0.7)[0]
    wide = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    torch.testing.assert_close(result, attention(module(), q, *wide, None, scaling=0.7)[0])
    bias = torch.randn(1, H, L, L)
    result = attention(module(), q, *wide, None, position_bias=bias)[0]
    torch.testing.assert_close(result, attention(module(), q, *wide, bias.expand(B, H, L, L))[0])


@every
def test_dropout_in_training_only(attention):
    q, k, v = operands()
    plain = attention(module(), q, k, v, None)[0]
    assert torch.equal(attention(module(), q, k, v, None, dropout=0.5)[0], plain)
    assert not torch.equal(attention(module(training=True), q, k, v, None, dropout=0.5)[0], plain)
    torch.manual_seed(1)
    many = torch.stack([attention(module(training=True), q, k, v, None, dropout=0.5)[0] for _ in range(200)])
    torch.testing.assert_close(many.mean(0), plain, rtol=0.3, atol=0.15)


def test_gradients_of_int8_pass_straight():
    """Those of attention on the rounded numbers."""
    q, k, v = (x.requires_grad_() for x in operands(dtype=torch.float64))
    grad = torch.randn(B, L, H, D, dtype=torch.float64)
    found = torch.autograd.grad(int8_attention(module(), q, k, v, None)[0], (q, k, v), grad)
    expected = torch.autograd.grad(sdpa(q, k, v).transpose(1, 2), (q, k, v), grad)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.05


@pytest.mark.parametrize("attention", [binary_attention, learned_attention])
def test_gradients_of_binary_reach_every_operand(attention):
    q, k, v = (x.requires_grad_() for x in operands())
    made = module()
    attention(made, q, k, v, None)[0].square().sum().backward()
    learned = [q, k, v, *made.parameters()]
    assert len(learned) == 3 + (attention is learned_attention)
    assert all(bool(torch.isfinite(x.grad).all()) and float(x.grad.abs().sum()) > 0 for x in learned)


@every
def test_dtypes_and_empty_batches(attention):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        q, k, v = operands(dtype=dtype)
        result, weights = attention(module(), q, k, v, None)
        assert result.dtype == weights.dtype == dtype and result.shape == (B, L, H, D)
    empty, _ = attention(module(), q[:0], k[:0], v[:0], None)
    assert empty.shape == (0, L, H, D)
    zeros, _ = attention(module(), *(torch.zeros_like(x) for x in (q, k, v)), None)
    assert torch.equal(zeros, torch.zeros_like(zeros))


@every
def test_compiled_in_one_graph(attention):
    torch._dynamo.reset()
    q, k, v = operands()
    made = module()
    if attention is learned_attention:
        attention(made, q, k, v, None)
        attention = binary_attention
    compiled = torch.compile(lambda q, k, v: attention(made, q, k, v, None)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attention(made, q, k, v, None)[0])


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
