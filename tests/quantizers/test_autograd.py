"""`quantize`: forward a F(W / s), backward B(W / s) a / s times the gradient, for every registered pair."""

import itertools
import math

import numpy as np
import pytest
import torch

from pair_formulas import ROWS, swish, swish_slope, units, weight_and_gradient
from pair_formulas import plus_minus as signs
from proxbit import blocks
from proxbit.errors import ConfigError
from proxbit.kernels import native
from proxbit.quantizers import PAIRS, RowUnits, autograd, compose, get_pair, hard_rows, quantize
from proxbit.quantizers.compiled import compiled_functions
from proxbit.quantizers.functions import BINARYRELAX, IDENTITY, SIGN_SWISH

# A mu at which F and B differ from their limits.
MU = {name: row[4][-1] for name, row in ROWS.items()}
NAMES = sorted(PAIRS)
SHAPES = [(5, 7), (4, 3, 2, 2), (1, 9), (6, 1)]
CENTERS = ("none", "remove", "restore")
UNITS = list(itertools.product(("row", "tensor", "std", "none"), ("ls", "fixed"), CENTERS))
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
every_center = pytest.mark.parametrize("center", CENTERS)


def latent_of(shape, dtype=torch.float64):
    """Rows of different size, with a 0 and a -0.0 in the first."""
    latent = torch.randn(shape, dtype=torch.float64)
    latent *= torch.logspace(-1, 1, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    latent.view(-1)[:2] = torch.tensor([0.0, -0.0])[: latent[0].numel()]
    if latent[0].numel() == 1:
        latent.view(-1)[:2] = torch.tensor([0.5, -0.5])
    return latent.to(dtype).requires_grad_()


def expected(name, latent, grad, mu, normalize, scale, hard, center="none"):
    rows, upstream = (tensor.detach().double().numpy().reshape(len(latent), -1) for tensor in (latent, grad))
    results = weight_and_gradient(name, rows, upstream, mu, normalize, scale, center, hard)
    return [result.reshape(latent.shape) for result in results]


@pytest.mark.parametrize(("index", "name"), list(enumerate(NAMES)), ids=NAMES)
def test_forward_and_backward(index, name):
    """Each pair in all row units. Shapes and hardness take turns, so that all pairs together have every combination."""
    mu = MU[name]
    for turn, (normalize, scale, center) in enumerate(UNITS, index):
        shape, hard = SHAPES[turn % 4], turn // 4 % 2 == 1
        if shape[1:] == (1,) and (center != "none" or normalize == "std"):
            continue  # The deviation of a single number from its mean is zero: there is no unit.
        latent, grad = latent_of(shape), torch.randn(shape, dtype=torch.float64)
        sharpness, modes = torch.tensor(mu, dtype=torch.float64), RowUnits(normalize, scale, center)
        result = quantize(latent, sharpness, get_pair(name), modes, hard=hard)
        result.backward(grad)
        value, slope = expected(name, latent, grad, mu, normalize, scale, hard, center)
        np.testing.assert_allclose(result.detach().numpy(), value, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(latent.grad.numpy(), slope, rtol=1e-8, atol=1e-12)


def blocks_of(latent):
    with torch.no_grad():
        return len(autograd._blocks(latent.flatten(1)))


@pytest.mark.parametrize(("index", "name"), list(enumerate(["bc", "pc", "bnn++", "ede", "fda++"])))
def test_many_blocks_are_one(index, name, monkeypatch):
    """The same numbers but for the last bits of sums and of transcendental functions; half precision hides those.

    `bc` and `pc` are made of additions, products and comparisons only, which round alike wherever an element lies.
    """
    mu = torch.tensor(MU[name], dtype=torch.float64)
    for modes in {*UNITS[index::4], ("none", "fixed", "none")}:
        exact = modes == ("none", "fixed", "none") and name in ("bc", "pc")
        for shape, dtype, hard in (
            ((9, 37), torch.float64, False),
            ((5, 3, 2, 2), torch.float64, True),
            ((9, 37), torch.float16, False),
        ):
            start, grad, results = latent_of(shape, dtype).detach(), torch.randn(shape).to(dtype), []
            for block in (131072, 30):
                monkeypatch.setattr(blocks, "BLOCK", block // torch.get_num_threads())
                latent = start.clone().requires_grad_()
                assert (blocks_of(latent) > 1) == (block < latent.numel())
                weight = quantize(latent, mu, get_pair(name), RowUnits(*modes), hard=hard)
                weight.backward(grad)
                results.append((weight.detach(), latent.grad))
            tolerance = 0 if exact else max(1e-12, torch.finfo(dtype).eps)
            for one, many in zip(*results, strict=True):
                torch.testing.assert_close(many, one, rtol=0, atol=tolerance * float(one.abs().max()))


@pytest.mark.parametrize("block", [131072, 1], ids=["one-block", "many-blocks"])
def test_transposed_and_channels_last_latents(block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    for latent in (latent_of((7, 5)).t(), latent_of((4, 3, 2, 2)).to(memory_format=torch.channels_last)):
        view, plain = latent.detach().requires_grad_(), latent.detach().contiguous().requires_grad_()
        assert not view.is_contiguous()
        assert (blocks_of(view) > 1) == (block == 1)
        grad = torch.randn(plain.shape, dtype=torch.float64)
        weights = [quantize(weight, torch.tensor(1.7), get_pair("bnn++"), center="restore") for weight in (view, plain)]
        for weight in weights:
            weight.backward(grad)
        torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(view.grad, plain.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("block", [131072, 1], ids=["one-block", "many-blocks"])
def test_one_divisor_for_all_rows(block, monkeypatch):
    """DoReFa: a weight of two values, the mean size of all of it."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    latent = torch.tensor([[1.0, -2.0], [0.25, 0.75], [-6.0, 8.0]])
    weight = quantize(latent, torch.tensor(1.0), get_pair("dorefa"), normalize="tensor", scale="fixed")
    assert weight.tolist() == [[3.0, -3.0], [3.0, 3.0], [-3.0, 3.0]]
    assert hard_rows(latent, normalize="tensor", scale="fixed").scale.tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name):
    """Value and gradient have the dtype of the latent, and its precision: sums over a row are taken in fp32."""
    mu = torch.tensor(MU[name], dtype=torch.float64)
    for dtype in DTYPES:
        latent, grad = latent_of((3, 300), dtype), torch.randn(3, 300).to(dtype)
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
    assert hard_rows(latent, normalize="row", scale="ls").scale.tolist() == [30.0]


@pytest.mark.parametrize(
    ("name", "mu", "shape"),
    [
        ("bnn++", 0.3, (3, 5)),
        ("bnn++", 4.0, (2, 2, 2, 2)),
        ("parq", 1.0, (3, 5)),
        ("pc", 0.0, (3, 5)),
        ("binaryrelax", 0.0, (2, 2, 2, 2)),
    ],
)
def test_gradcheck_where_the_backward_is_the_exact_gradient(name, mu, shape):
    """In raw units, and where P is the identity: always for bnn++, inside (-1, 1) at the soft end for the others."""
    latent = (torch.rand(shape, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()
    sharpness = torch.tensor(mu, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda w: quantize(w, sharpness, get_pair(name), normalize="none", scale="fixed"), latent
    )


@pytest.mark.parametrize("block", [131072, 1], ids=["one-block", "many-blocks"])
@every_center
def test_gradients_through_the_mean_and_second_derivatives(center, block, monkeypatch):
    """For bnn++ in the raw form B is the derivative of F, and the mean is linear: a smooth function like any other."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    latent, mu = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor(1.3, dtype=torch.float64)
    assert (blocks_of(latent) > 1) == (block == 1)
    for pair in (get_pair("bnn++"), compose(IDENTITY, lambda p, mu: (mu * p).tanh())):

        def weight(latent, pair=pair):
            return quantize(latent, mu, pair, normalize="none", scale="fixed", center=center)

        assert torch.autograd.gradcheck(weight, latent)
        assert torch.autograd.gradgradcheck(weight, latent)


def test_finite_differences_with_scales_held():
    """bnn++: the gradient of sum(g a F(W / s)), with s and a as numbers, by central differences of F in numpy."""
    mu, step = 1.7, 1e-6
    for normalize, scale, _ in UNITS[:: len(CENTERS)]:
        latent, grad = latent_of((4, 6)), torch.randn(4, 6, dtype=torch.float64)
        sharpness = torch.tensor(mu, dtype=torch.float64)
        quantize(latent, sharpness, get_pair("bnn++"), normalize=normalize, scale=scale).backward(grad)
        rows = latent.detach().numpy()
        _, s = units(rows, normalize, "none")
        q = swish(rows / s, mu)
        a = s if scale == "fixed" else (q * rows).sum(axis=1, keepdims=True) / (q * q).sum(axis=1, keepdims=True)
        difference = a * (swish((rows + step * s) / s, mu) - swish((rows - step * s) / s, mu)) / (2 * step * s)
        np.testing.assert_allclose(latent.grad.numpy(), grad.numpy() * difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_weights_have_the_sign_of_the_latent(dtype):
    """However small a weight is beside its row: what is packed is the sign of the latent, not of its quotient."""
    small = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    latent = torch.tensor([[-small, small, 0.0, -0.0, 30.0, -30.0, 30.0, 30.0]], dtype=dtype)
    result = quantize(latent, torch.tensor(1.0), get_pair("bnn++"), hard=True)
    assert [math.copysign(1, value) for value in result.flatten().tolist()] == [-1, 1, 1, 1, 1, -1, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_rows_are_those_of_the_hard_weight(dtype):
    for normalize, scale, center in UNITS:
        latent, modes = latent_of((5, 3, 2, 2), dtype).detach(), RowUnits(normalize, scale, center)
        weight = quantize(latent, torch.tensor(2.0), get_pair("bnn++"), modes, hard=True)
        values, row_scale, offset = hard_rows(latent, modes)
        c, _ = units(latent.double().numpy().reshape(5, 12), normalize, center)
        np.testing.assert_allclose(values.double().numpy(), latent.double().numpy().reshape(5, 12) - c, atol=1e-5)
        for stored in (row_scale, offset) if center == "restore" else (row_scale,):
            assert (stored.dtype, stored.shape) == (dtype, (5,))
            assert stored.is_contiguous() and not stored.requires_grad
        assert (offset is not None) == (center == "restore")
        parts = torch.from_numpy(signs(values.double().numpy())).to(dtype) * row_scale.view(5, 1)
        if offset is not None:
            np.testing.assert_allclose(offset.double().numpy(), c[:, 0], rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
            parts = parts + offset.view(5, 1)
        # In half precision the weight is rounded once, and what is stored is rounded twice.
        twice = center == "restore" and dtype.itemsize == 2
        rounding = 2 * torch.finfo(dtype).eps * float(weight.abs().max()) * twice
        torch.testing.assert_close(weight.flatten(1), parts, rtol=0, atol=rounding)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_only_the_latent_and_numbers_a_row_are_kept(hard):
    for modes in itertools.starmap(RowUnits, UNITS):
        latent, kept = latent_of((8, 64)), []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda each, to=kept: to.append(each) or each, lambda each: each
        )
        with hooks:
            quantize(latent, torch.tensor(1.0), get_pair("bnn++"), modes, hard=hard)
        shared = [tensor for tensor in kept if tensor.data_ptr() == latent.data_ptr()]
        assert [tensor.shape for tensor in shared] == [latent.shape]
        assert sum(tensor.numel() for tensor in kept) <= latent.numel() + 2 * len(latent) + 1


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


@pytest.mark.parametrize("field", ["normalize", "scale", "center"])
def test_unknown_row_units_are_refused(field):
    with pytest.raises(ConfigError, match=f"{field} must be one of .*; not 'rows'"):
        quantize(torch.randn(4, 6), torch.tensor(1.0), get_pair("bnn++"), **{field: "rows"})


def test_own_pair_without_gradients():
    pair = compose(BINARYRELAX, SIGN_SWISH)
    latent = latent_of((2, 6))
    with torch.no_grad():
        result = quantize(latent, torch.tensor(1.0), pair, normalize="none", scale="fixed")
    w = latent.detach().numpy()
    np.testing.assert_allclose(result.numpy(), swish((w + signs(w)) / 2, 1.0), rtol=1e-12)


@pytest.mark.parametrize("name", ["bc", "pc", "bnn+", "bnn++", "fda++", "reste"])
def test_compiles_whole_and_once_for_every_mu(name):
    """One graph, the eager numbers, and no second compilation when mu moves; a change of dtype would need one. What the
    kernels know is the same to the last bit."""
    torch.compiler.reset()
    pair, lowest = get_pair(name), MU[name]
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
            is_known = native() is not None and compiled_functions(pair) is not None
            torch.testing.assert_close(latent.grad, twin.grad, **({"rtol": 0, "atol": 0} if is_known else {}))
        with pytest.raises(RuntimeError, match="recompil"):
            compiled(latent.double(), mu)
