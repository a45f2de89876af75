"""Compiled forward and backward quantizers, at every instruction level that this machine runs, against numpy."""

from functools import partial

import pytest
import torch

import proxbit.kernels
from latent_rows import FORMULAS, assert_last_digits, assert_weight_and_gradient, latent_of, number
from proxbit.analysis.timing import torch_threads
from proxbit.errors import PackedFormatError
from proxbit.kernels.interface import FUNCTIONS
from proxbit.kernels.native import find_library, levels
from proxbit.kernels.quantizer import gradient_rows, quantize_rows

LIBRARY = find_library(proxbit.kernels.__path__)
LEVELS = levels(LIBRARY) if LIBRARY else {}
SHAPES = [(1, 1), (3, 5), (2, 16), (5, 17), (4, 64), (3, 1001)]
level = pytest.mark.parametrize("level", LEVELS.values(), ids=list(LEVELS))
function = pytest.mark.parametrize("function", FUNCTIONS)


def test_every_function_has_a_formula():
    assert tuple(FORMULAS) == FUNCTIONS


@level
@function
@pytest.mark.parametrize("mu", [1e-3, 0.3, 5.0, 100.0])
def test_values_to_the_last_digits(level, function, mu):
    assert_last_digits(partial(quantize_rows, level), function, mu)


@level
@function
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_and_gradient(level, function, shape):
    assert_weight_and_gradient(partial(quantize_rows, level), partial(gradient_rows, level), function, shape)


@level
@function
def test_one_row_knows_nothing_of_the_others(level, function):
    """Whatever the threads, and however many rows there are: the same bits; NaN stays in its row."""
    latent, grad = latent_of((67, 1033)), torch.randn(67, 1033)
    latent[5, 7] = float("nan")
    found = []
    for count in (1, 3):
        with torch_threads(count):
            weight, divisor, factor = quantize_rows(level, function, latent, number(3.0), "ls", None, None)
            found.append((weight, gradient_rows(level, function, latent, number(3.0), divisor, factor, grad)))
    rest = [i for i in range(67) if i != 5]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[rest], other[rest]) and bool(one[rest].isfinite().all())
    assert bool(found[0][0][5].isnan().all()) and bool(found[0][1][5].isnan().all())
    alone = quantize_rows(level, function, latent[9:10], number(3.0), "ls", None, None)
    assert torch.equal(alone[0], found[0][0][9:10])


@level
@function
def test_rows_of_any_size_are_alike(level, function):
    latent = latent_of((1, 37))
    sizes = torch.tensor([[2.0**-60], [1.0], [2.0**60]])
    weight, _, _ = quantize_rows(level, function, sizes * latent, number(1.3), "ls", None, None)
    assert torch.equal(weight / sizes, weight[1].expand(3, -1))


@level
def test_values_at_the_edges(level):
    """A row of zeros has no unit; the smallest numbers have signs; the largest do not overflow on the way."""
    zeros = torch.zeros(2, 9)
    for name in FUNCTIONS:
        weight, divisor, factor = quantize_rows(level, name, zeros, number(2.0), "ls", None, None)
        assert not weight.any() and bool((divisor == torch.finfo(torch.float32).tiny).all())
        assert bool(gradient_rows(level, name, zeros, number(2.0), divisor, factor, torch.ones(2, 9)).isfinite().all())
    small = torch.tensor([[-1e-45, 1e-45, 0.0, -0.0, 30.0, -30.0]])
    weight, _, _ = quantize_rows(level, "sign", small, number(1.0), "ls", None, None)
    assert weight.sign().tolist() == [[-1.0, 1.0, 1.0, 1.0, 1.0, -1.0]]
    huge = torch.full((1, 8), 1e37)
    weight, _, _ = quantize_rows(level, "sign-swish", huge, number(1e6), "fixed", None, None)
    torch.testing.assert_close(weight, huge)


@level
def test_a_gradient_in_place_of_another(level):
    latent, grad, numbers = latent_of((3, 700)), torch.randn(3, 700), torch.rand(3, 1) + 0.5
    given = "tanh slope", latent, number(1.0), numbers, numbers
    before, expected = grad.clone(), gradient_rows(level, *given, grad)
    assert torch.equal(grad, before)
    made = gradient_rows(level, *given, grad, overwrite=True)
    assert made.data_ptr() == grad.data_ptr() and torch.equal(made, expected)


@level
def test_what_is_given_need_not_be_contiguous(level):
    latent, grad = latent_of((6, 20)), torch.randn(20, 6).t()
    divisor, factor = (torch.rand(2, 6, 3) + 0.5)[..., :1].unbind()
    assert not (divisor.is_contiguous() or grad.is_contiguous())
    for given in (grad, torch.tensor(2.0).expand(6, 20), torch.complex(grad, -grad).conj().imag):
        plain = [each.contiguous() for each in (divisor, factor, given.resolve_neg())]
        for name in FUNCTIONS:
            one, other = (
                gradient_rows(level, name, latent, number(1.0), *numbers)
                for numbers in ((divisor, factor, given), plain)
            )
            assert torch.equal(one, other)
            one, other = (
                quantize_rows(level, name, latent, number(1.0), "ls", *numbers)[0]
                for numbers in ((divisor, factor), plain[:2])
            )
            assert torch.equal(one, other)


@level
def test_tensors_that_are_not_what_they_should_be(level):
    """An error, before the library sees an address."""
    latent, grad, numbers = torch.randn(4, 6), torch.randn(4, 6), torch.ones(4, 1)
    freed, shrunk = grad.clone(), grad.clone()
    freed.untyped_storage().resize_(0)
    shrunk.untyped_storage().resize_(40)
    for bad, message in (
        (freed, "beyond its storage"),
        (shrunk, "beyond its storage"),
        (grad[:3], r"\[4, 6\] in fp32, not \[3, 6\]"),
        (grad.double(), "in fp32, not"),
        (grad.to("meta"), "on the device meta"),
    ):
        with pytest.raises(PackedFormatError, match=message):
            gradient_rows(level, "one", latent, number(1.0), numbers, numbers, bad)
    for bad in (numbers[:3], torch.ones(4), numbers.double()):
        for given in ((bad, numbers), (numbers, bad)):
            with pytest.raises(PackedFormatError, match=r"\[4, 1\] in fp32, not"):
                quantize_rows(level, "one", latent, number(1.0), "ls", *given)
    with pytest.raises(PackedFormatError, match="beyond its storage"):
        quantize_rows(level, "one", shrunk, number(1.0), "ls", None, None)
