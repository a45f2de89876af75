"""Compiled forward and backward quantizers, at every ISA that this machine runs, against numpy."""

import pytest
import torch

import proxbit.kernels
from latent_rows import FORMULAS, assert_last_digits, assert_weight_and_gradient, latent_of, number
from proxbit.analysis.timing import torch_threads
from proxbit.errors import PackedFormatError
from proxbit.kernels import LatentRows
from proxbit.kernels.cpu import isas
from proxbit.kernels.interface import FUNCTIONS, find_library

LIBRARY = find_library(proxbit.kernels.__path__)
ISAS = isas(LIBRARY) if LIBRARY else {}
SHAPES = [(1, 1), (3, 5), (2, 16), (5, 17), (4, 64), (3, 1001)]
isa = pytest.mark.parametrize("isa", ISAS.values(), ids=list(ISAS))
function = pytest.mark.parametrize("function", FUNCTIONS)


def test_every_function_has_a_formula():
    assert tuple(FORMULAS) == FUNCTIONS


@isa
@function
def test_values_to_the_last_digits(isa, function):
    for mu in (1e-3, 0.3, 5.0, 100.0):
        assert_last_digits(isa, function, mu)


@isa
@function
def test_weight_and_gradient(isa, function):
    for shape in SHAPES:
        assert_weight_and_gradient(isa, function, shape)


@isa
def test_one_row_knows_nothing_of_the_others(isa):
    """Whatever the threads, and however many rows there are: the same bits; NaN stays in its row."""
    latent, grad = latent_of((67, 1033)), torch.randn(67, 1033)
    latent[5, 7] = float("nan")
    rest = [i for i in range(67) if i != 5]
    for function in FUNCTIONS:
        found, given = [], LatentRows(function, latent, number(3.0))
        for count in (1, 3):
            with torch_threads(count):
                weight, divisor, factor = isa.quantize_rows(given, "ls")
                found.append((weight, isa.gradient_rows(given._replace(divisor=divisor, factor=factor), grad)))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one[rest], other[rest]) and bool(one[rest].isfinite().all())
        assert bool(found[0][0][5].isnan().all()) and bool(found[0][1][5].isnan().all())
        alone = isa.quantize_rows(given._replace(latent=latent[9:10]), "ls")
        assert torch.equal(alone[0], found[0][0][9:10])


@isa
def test_rows_of_any_size_are_alike(isa):
    latent = latent_of((1, 37))
    sizes = torch.tensor([[2.0**-60], [1.0], [2.0**60]])
    for function in FUNCTIONS:
        weight, _, _ = isa.quantize_rows(LatentRows(function, sizes * latent, number(1.3)), "ls")
        assert torch.equal(weight / sizes, weight[1].expand(3, -1))


@isa
def test_values_at_the_edges(isa):
    """A row of zeros has no unit; the smallest numbers have signs; the largest do not overflow on the way."""
    zeros = torch.zeros(2, 9)
    for name in FUNCTIONS:
        rows = LatentRows(name, zeros, number(2.0))
        weight, divisor, factor = isa.quantize_rows(rows, "ls")
        assert not weight.any() and bool((divisor == torch.finfo(torch.float32).tiny).all())
        rows = rows._replace(divisor=divisor, factor=factor)
        assert bool(isa.gradient_rows(rows, torch.ones(2, 9)).isfinite().all())
    small = torch.tensor([[-1e-45, 1e-45, 0.0, -0.0, 30.0, -30.0]])
    weight, _, _ = isa.quantize_rows(LatentRows("sign", small, number(1.0)), "ls")
    assert weight.sign().tolist() == [[-1.0, 1.0, 1.0, 1.0, 1.0, -1.0]]
    huge = torch.full((1, 8), 1e37)
    weight, _, _ = isa.quantize_rows(LatentRows("sign-swish", huge, number(1e6)), "fixed")
    torch.testing.assert_close(weight, huge)


@isa
def test_a_gradient_in_place_of_another(isa):
    latent, grad, numbers = latent_of((3, 700)), torch.randn(3, 700), torch.rand(3, 1) + 0.5
    rows = LatentRows("tanh slope", latent, number(1.0), numbers, numbers)
    before, expected = grad.clone(), isa.gradient_rows(rows, grad)
    assert torch.equal(grad, before)
    made = isa.gradient_rows(rows, grad, overwrite=True)
    assert made.data_ptr() == grad.data_ptr() and torch.equal(made, expected)


@isa
def test_what_is_given_need_not_be_contiguous(isa):
    latent, grad = latent_of((6, 20)), torch.randn(20, 6).t()
    divisor, factor = (torch.rand(2, 6, 3) + 0.5)[..., :1].unbind()
    assert not (divisor.is_contiguous() or grad.is_contiguous())
    for given in (grad, torch.tensor(2.0).expand(6, 20), torch.complex(grad, -grad).conj().imag):
        for name in ("sign-swish", "box"):
            strided = LatentRows(name, latent, number(1.0), divisor, factor)
            plain = strided._replace(divisor=divisor.contiguous(), factor=factor.contiguous())
            expected = isa.gradient_rows(plain, given.resolve_neg().contiguous())
            assert torch.equal(isa.gradient_rows(strided, given), expected)
            assert torch.equal(isa.quantize_rows(strided, "ls")[0], isa.quantize_rows(plain, "ls")[0])


@isa
def test_tensors_that_are_not_what_they_should_be(isa):
    """An error, before the library sees an address."""
    latent, grad, numbers = torch.randn(4, 6), torch.randn(4, 6), torch.ones(4, 1)
    freed, shrunk = grad.clone(), grad.clone()
    freed.untyped_storage().resize_(0)
    shrunk.untyped_storage().resize_(40)
    rows = LatentRows("one", latent, number(1.0), numbers, numbers)
    for bad, message in (
        (freed, "beyond its storage"),
        (shrunk, "beyond its storage"),
        (grad[:3], r"\[4, 6\] in fp32, not \[3, 6\]"),
        (grad.double(), "in fp32, not"),
        (grad.to("meta"), "on the device meta"),
    ):
        with pytest.raises(PackedFormatError, match=message):
            isa.gradient_rows(rows, bad)
    for bad in (numbers[:3], torch.ones(4), numbers.double()):
        for given in ({"divisor": bad}, {"factor": bad}):
            with pytest.raises(PackedFormatError, match=r"\[4, 1\] in fp32, not"):
                isa.quantize_rows(rows._replace(**given), "ls")
    with pytest.raises(PackedFormatError, match="beyond its storage"):
        isa.quantize_rows(LatentRows("one", shrunk, number(1.0)), "ls")
