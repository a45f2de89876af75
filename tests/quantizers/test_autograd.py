"""`quantize`: forward a F(W / s), backward B(W / s) a / s times the gradient, for every registered pair."""

import math

import numpy as np
import pytest
import torch

from pair_formulas import ROWS, swish, swish_slope
from pair_formulas import plus_minus as signs
from proxbit.quantizers import PAIRS, compose, get_pair, hard_scale, quantize
from proxbit.quantizers.proximal import BINARYRELAX
from proxbit.quantizers.transforms import SIGN_SWISH

# name: F, B, and a mu at which they differ from their limits.
FORMULAS = {name: (forward, backward, mus[-1]) for name, (forward, backward, _, _, mus) in ROWS.items()}
NAMES = sorted(PAIRS)
SHAPES = {"matrix": (5, 7), "kernel": (4, 3, 2, 2), "one-row": (1, 9), "one-column": (6, 1)}
MODES = [(normalize, scale) for normalize in ("row", "tensor", "none") for scale in ("ls", "fixed")]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
every_mode = pytest.mark.parametrize(("normalize", "scale"), MODES)


def latent_of(shape, dtype=torch.float64):
    """Rows of different size, with a 0 and a -0.0 in the first."""
    latent = torch.randn(shape, dtype=torch.float64)
    latent *= torch.logspace(-1, 1, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    latent.view(-1)[:2] = torch.tensor([0.0, -0.0])[: latent[0].numel()]
    if latent[0].numel() == 1:
        latent.view(-1)[:2] = torch.tensor([0.5, -0.5])
    return latent.to(dtype).requires_grad_()


def expected(name, latent, grad, mu, normalize, scale, hard):
    """Value and gradient in double precision, from the formulas; s and a are numbers."""
    forward, backward, _ = FORMULAS[name]
    rows = latent.detach().double().numpy().reshape(len(latent), -1)
    means = {
        "row": np.abs(rows).mean(axis=1, keepdims=True),
        "tensor": np.full((len(rows), 1), np.abs(rows).mean()),
        "none": np.ones((len(rows), 1)),
    }
    s = means[normalize]
    q = signs(rows) if hard else forward(rows / s, mu)
    a = s if scale == "fixed" else (q * rows).sum(axis=1, keepdims=True) / (q * q).sum(axis=1, keepdims=True)
    slope = grad.double().numpy().reshape(rows.shape) * backward(rows / s, mu) * a / s
    return (a * q).reshape(latent.shape), slope.reshape(latent.shape)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@every_mode
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name, shape, normalize, scale, hard):
    latent, grad, mu = latent_of(shape), torch.randn(shape, dtype=torch.float64), FORMULAS[name][2]
    result = quantize(
        latent, torch.tensor(mu, dtype=torch.float64), get_pair(name), normalize=normalize, scale=scale, hard=hard
    )
    result.backward(grad)
    value, slope = expected(name, latent, grad, mu, normalize, scale, hard)
    np.testing.assert_allclose(result.detach().numpy(), value, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(latent.grad.numpy(), slope, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name, dtype):
    """Value and gradient have the dtype of the latent, and its precision: sums over a row are taken in fp32."""
    latent = latent_of((3, 300), dtype)
    mu = torch.tensor(FORMULAS[name][2], dtype=torch.float64)
    grad = torch.randn(3, 300).to(dtype)
    result = quantize(latent, mu, get_pair(name))
    result.backward(grad)
    assert result.dtype == latent.grad.dtype == dtype
    value, slope = expected(name, latent, grad, mu.item(), "row", "ls", False)
    sums = 1e-12 if dtype == torch.float64 else 2e-5
    precision = max(torch.finfo(dtype).eps, sums)
    np.testing.assert_allclose(result.detach().double().numpy(), value, rtol=precision, atol=sums)
    np.testing.assert_allclose(latent.grad.double().numpy(), slope, rtol=precision, atol=sums)


def test_half_precision_rows_are_summed_in_single_precision():
    """A sum in fp16 would overflow at 65504."""
    latent = torch.full((1, 4096), 30.0, dtype=torch.float16)
    assert quantize(latent, torch.tensor(1.0), get_pair("bc"), hard=True).unique().tolist() == [30.0]
    assert hard_scale(latent, normalize="row", scale="ls").tolist() == [30.0]


@pytest.mark.parametrize(
    ("name", "mu"), [("bnn++", 0.3), ("bnn++", 4.0), ("parq", 1.0), ("pc", 0.0), ("binaryrelax", 0.0)]
)
@pytest.mark.parametrize("shape", [(3, 5), (2, 2, 2, 2)], ids=["matrix", "kernel"])
def test_gradcheck_where_the_backward_is_the_exact_gradient(name, mu, shape):
    """In raw units, and where P is the identity: always for bnn++, inside (-1, 1) at the soft end for the others."""
    latent = (torch.rand(shape, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()
    sharpness = torch.tensor(mu, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda w: quantize(w, sharpness, get_pair(name), normalize="none", scale="fixed"), latent
    )


@every_mode
def test_finite_differences_with_scales_held(normalize, scale):
    """bnn++: the gradient of sum(g a F(W / s)), with s and a as numbers, by central differences of F in numpy."""
    latent, grad, mu, step = latent_of((4, 6)), torch.randn(4, 6, dtype=torch.float64), 1.7, 1e-6
    result = quantize(
        latent, torch.tensor(mu, dtype=torch.float64), get_pair("bnn++"), normalize=normalize, scale=scale
    )
    result.backward(grad)
    rows = latent.detach().numpy()
    means = {"row": np.abs(rows).mean(axis=1, keepdims=True), "tensor": np.abs(rows).mean(), "none": 1.0}
    s = means[normalize] * np.ones((4, 1))
    q = swish(rows / s, mu)
    a = s if scale == "fixed" else (q * rows).sum(axis=1, keepdims=True) / (q * q).sum(axis=1, keepdims=True)
    difference = a * (swish((rows + step * s) / s, mu) - swish((rows - step * s) / s, mu)) / (2 * step * s)
    np.testing.assert_allclose(latent.grad.numpy(), grad.numpy() * difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", ["ls", "fixed"])
def test_rows_of_any_size_are_alike(name, scale):
    """F(W / s) does not see the size of a row: the weight scales with it, the multiplier stays."""
    latent, grad = latent_of((4, 9)), torch.randn(4, 9, dtype=torch.float64)
    sizes = torch.tensor([2.0**-20, 0.5, 8.0, 2.0**20], dtype=torch.float64).unsqueeze(1)
    scaled = (latent.detach() * sizes).requires_grad_()
    mu = torch.tensor(FORMULAS[name][2], dtype=torch.float64)
    one = quantize(latent, mu, get_pair(name), scale=scale)
    other = quantize(scaled, mu, get_pair(name), scale=scale)
    assert torch.equal(other, one * sizes)
    one.backward(grad)
    other.backward(grad)
    assert torch.equal(scaled.grad, latent.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["ordinary", "smallest"])
def test_hard_weights_have_the_sign_of_the_latent(dtype, size):
    """However small a weight is beside its row: what is packed is the sign of the latent, not of its quotient."""
    small = {"ordinary": 1.0, "smallest": torch.finfo(dtype).tiny * torch.finfo(dtype).eps}[size]
    latent = torch.tensor([[-small, small, 0.0, -0.0, 30.0, -30.0, 30.0, 30.0]], dtype=dtype)
    result = quantize(latent, torch.tensor(1.0), get_pair("bnn++"), hard=True)
    assert [math.copysign(1, value) for value in result.flatten().tolist()] == [-1, 1, 1, 1, 1, -1, 1, 1]


@every_mode
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_scale_is_that_of_the_hard_weight(normalize, scale, dtype):
    latent = latent_of((5, 3, 2, 2), dtype)
    weight = quantize(latent, torch.tensor(2.0), get_pair("bnn++"), normalize=normalize, scale=scale, hard=True)
    row_scale = hard_scale(latent, normalize=normalize, scale=scale)
    assert row_scale.dtype == dtype
    assert row_scale.shape == (5,)
    assert row_scale.is_contiguous()
    assert not row_scale.requires_grad
    plus_minus = torch.from_numpy(signs(latent.detach().double().numpy())).to(dtype)
    assert torch.equal(weight, plus_minus * row_scale.view(5, 1, 1, 1))


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@every_mode
def test_only_the_latent_and_numbers_a_row_are_kept(normalize, scale, hard):
    latent, kept = latent_of((8, 64)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        quantize(latent, torch.tensor(1.0), get_pair("bnn++"), normalize=normalize, scale=scale, hard=hard)
    shared = [tensor for tensor in kept if tensor.data_ptr() == latent.data_ptr()]
    assert [tensor.shape for tensor in shared] == [latent.shape]
    assert sum(tensor.numel() for tensor in kept) <= latent.numel() + 2 * len(latent)


def test_accumulation_sees_the_mu_of_each_forward():
    """mu moves in place between two forwards and their common backward."""
    latent, mu = latent_of((3, 4)), torch.tensor(1.0, dtype=torch.float64)
    first = quantize(latent, mu, get_pair("bnn++"), normalize="none", scale="fixed")
    mu.fill_(5.0)
    second = quantize(latent, mu, get_pair("bnn++"), normalize="none", scale="fixed")
    mu.fill_(20.0)
    (first + second).sum().backward()
    w = latent.detach().numpy()
    np.testing.assert_allclose(latent.grad.numpy(), swish_slope(w, 1.0) + swish_slope(w, 5.0), rtol=1e-9, atol=1e-13)


def test_accumulation_adds_up():
    latent, mu = latent_of((3, 4)), torch.tensor(2.0)
    quantize(latent, mu, get_pair("bnn++")).sum().backward()
    once = latent.grad.clone()
    quantize(latent, mu, get_pair("bnn++")).sum().backward()
    assert torch.equal(latent.grad, 2 * once)


def test_transposed_and_channels_last_latents():
    mu = torch.tensor(1.7, dtype=torch.float64)
    for latent in (latent_of((7, 5)).t(), latent_of((4, 3, 2, 2)).to(memory_format=torch.channels_last)):
        view = latent.detach().requires_grad_()
        assert not view.is_contiguous()
        plain = latent.detach().contiguous().requires_grad_()
        grad = torch.randn(*plain.shape[::-1], dtype=torch.float64).permute(*reversed(range(plain.dim())))
        for weight in (view, plain):
            quantize(weight, mu, get_pair("bnn++")).backward(grad)
        torch.testing.assert_close(view.grad, plain.grad, rtol=1e-13, atol=0)
        one, other = (quantize(weight, mu, get_pair("bnn++")) for weight in (view, plain))
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


def test_own_pair_and_no_gradient():
    pair = compose(BINARYRELAX, SIGN_SWISH)
    latent = latent_of((2, 6))
    with torch.no_grad():
        result = quantize(latent, torch.tensor(1.0), pair, normalize="none", scale="fixed")
    w = latent.detach().numpy()
    np.testing.assert_allclose(result.numpy(), swish((w + signs(w)) / 2, 1.0), rtol=1e-12)
    assert not result.requires_grad


@pytest.mark.parametrize("name", ["bc", "pc", "bnn+", "bnn++", "fda++", "reste"])
def test_compiles_whole_and_once_for_every_mu(name):
    """One graph, the eager numbers, and no second compilation when mu moves; a change of dtype would need one."""
    torch.compiler.reset()
    pair, lowest = get_pair(name), FORMULAS[name][2]
    compiled = torch.compile(lambda w, mu: quantize(w, mu, pair), fullgraph=True, backend="aot_eager")
    mu = torch.tensor(lowest, dtype=torch.float64)
    latent = latent_of((4, 9), torch.float32)
    compiled(latent, mu).square().sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for factor in (2.0, 3.5):
            mu.fill_(lowest * factor)
            twin = latent.detach().clone().requires_grad_()
            latent.grad = None
            compiled(latent, mu).square().sum().backward()
            quantize(twin, mu, pair).square().sum().backward()
            torch.testing.assert_close(latent.grad, twin.grad)
        with pytest.raises(RuntimeError, match="recompil"):
            compiled(latent.double(), mu)


def test_second_derivatives_are_those_of_the_backward_quantizer():
    """For bnn++ in the raw form, B is the derivative of F, so the whole is a smooth function like any other."""
    latent = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mu = torch.tensor(1.3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda w: quantize(w, mu, get_pair("bnn++"), normalize="none", scale="fixed"), (latent,)
    )
