"""Which weights the compiled quantizers take, and that they make the same numbers as torch's operators."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from latent_rows import FORMULAS
from pair_formulas import ROWS
from proxbit.kernels import CpuBackend, interface, pack_signs, unpack_signs
from proxbit.quantizers import (
    PAIRS,
    Function,
    compiled,
    compiled_functions,
    compose,
    get_pair,
    hard_rows,
    heuristic,
    quantize,
)
from proxbit.quantizers.functions import BOX, IDENTITY, PERIOD, POLYNOMIAL, SIGN_SWISH

MU = {name: row[4][-1] for name, row in ROWS.items()}
# What the kernels know of each pair, F and B: what has a compiled form anywhere has it in every pair.
KNOWN = {name: tuple(side in FORMULAS.values() for side in row[:2]) for name, row in ROWS.items()}
MODES = [
    {"normalize": normalize, "scale": scale}
    for normalize in ("row", "tensor", "std", "none")
    for scale in ("ls", "fixed")
]


def latent_of(*shape):
    return (torch.randn(shape) * torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))).requires_grad_()


def run(latent, pair, mu, grad, **modes):
    twin = latent.detach().clone().requires_grad_()
    weight = quantize(twin, torch.tensor(mu, dtype=torch.float64), pair, **modes)
    weight.backward(grad)
    return weight.detach(), twin.grad


def without_kernels(monkeypatch):
    monkeypatch.setattr(compiled, "backend_for", lambda operation, *tensors: None)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_which_sides_of_which_pairs_are_known(name):
    rows, pair = torch.randn(2, 3), get_pair(name)
    with torch.no_grad():
        known = compiled.compiled_forward(pair, False, rows), compiled.compiled_backward(pair, rows)
    assert tuple(each is not None for each in known) == KNOWN[name]
    assert (compiled.compiled_forward(pair, True, rows) is not None) == pair.binary
    functions = compiled.compiled_functions(pair)
    assert (functions is not None) == all(KNOWN[name]) and set(functions or ()) <= set(interface.FUNCTIONS)


@pytest.mark.parametrize("name", sorted(name for name, sides in KNOWN.items() if any(sides)))
def test_the_numbers_of_the_operators(name, monkeypatch):
    for index, modes in enumerate(MODES * 2):
        shape, hard = ((5, 37), (4, 3, 2, 2))[index % 2], index >= len(MODES)
        latent, grad = latent_of(*shape), torch.randn(shape)
        ours = run(latent, get_pair(name), MU[name], grad, hard=hard, **modes)
        with monkeypatch.context() as context:
            without_kernels(context)
            theirs = run(latent, get_pair(name), MU[name], grad, hard=hard, **modes)
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == shape
            near = 2e-5 if name == "fda++" else 2e-6  # The operators round each of its 32 terms.
            torch.testing.assert_close(one, other, rtol=1e-5, atol=near * float(other.abs().max()))


def test_what_is_packed_is_the_hard_weight_to_the_last_bit():
    for modes in MODES:
        latent = latent_of(9, 77)
        weight = quantize(latent, torch.tensor(1.0), get_pair("bnn++"), hard=True, **modes)
        rows = hard_rows(latent, **modes)
        signs = unpack_signs(pack_signs(rows.values), 77, torch.float32)
        assert torch.equal(signs * rows.scale.unsqueeze(1), weight)


def test_a_centred_weight_and_a_recorded_gradient_are_left_to_the_operators(monkeypatch):
    """As are other dtypes and other memory formats: their tests are those of `quantize`."""

    def fail(*args):
        raise AssertionError("the kernels ran")

    latent, grad, mu = latent_of(4, 6), torch.randn(4, 6), torch.tensor(1.3)
    weight = quantize(latent, mu, get_pair("bnn++"))
    monkeypatch.setattr(CpuBackend, "quantize_rows", fail)
    monkeypatch.setattr(CpuBackend, "gradient_rows", fail)
    torch.autograd.grad(weight, latent, grad, create_graph=True)
    for center in ("remove", "restore"):
        run(latent, get_pair("bnn++"), 1.3, grad, center=center)
    for other in (latent.double(), latent.bfloat16(), torch.randn(6, 4).t()):
        run(other.detach(), get_pair("bnn++"), 1.3, grad.to(other.dtype))
    with pytest.raises(AssertionError, match="the kernels ran"):
        quantize(latent, mu, get_pair("bnn++"))


def spoil_memory():
    """So that what is allocated next and not written to is seen."""
    return [torch.full((5, 24), torch.nan) for _ in range(50)]


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_what_records_operators_sees_all_of_them(hard):
    """A trace, a graph, a count of operations, and tensors without memory."""
    latent, mu, pair = latent_of(5, 24).detach(), torch.tensor(1.3), get_pair("bnn++")

    def weight(latent):
        return quantize(latent, mu, pair, hard=hard)

    other, expected = latent.flip(0), weight(latent.flip(0))
    for recorded in (torch.jit.trace(weight, latent, check_trace=False), make_fx(weight)(latent)):
        spoil_memory()
        torch.testing.assert_close(recorded(other), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert weight(latent).shape == (5, 24)
    counted = Counted()
    with counted:
        torch.testing.assert_close(weight(other), expected)
    assert counted.operators > 5


class Counted(TorchDispatchMode):
    operators = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators += 1
        return function(*args, **(kwargs or {}))


def test_second_derivatives_are_those_of_the_gradient():
    """The first derivative comes from the kernels, or from operators where it is differentiated once more."""
    latent, grad, mu = latent_of(3, 8), torch.randn(3, 8), torch.tensor(1.3, dtype=torch.float64)
    plain, recorded = (
        torch.autograd.grad(quantize(latent, mu, get_pair("bnn++")), latent, grad, create_graph=again)[0]
        for again in (False, True)
    )
    torch.testing.assert_close(plain, recorded, rtol=1e-5, atol=1e-6)
    assert recorded.requires_grad and not plain.requires_grad
    assert bool(torch.autograd.grad(recorded.sum(), latent)[0].isfinite().all())


def test_own_pairs_of_known_functions_are_known_and_others_are_not():
    """A function of the user is not compared, hashed or called."""

    @dataclass
    class Unhashable:
        slope: float

        def __call__(self, w, mu):
            return w * self.slope

        def __eq__(self, other):
            raise AssertionError("compared")

    rows = torch.randn(2, 3)
    with torch.no_grad():
        for pair in (
            compose(IDENTITY, SIGN_SWISH),
            heuristic(SIGN_SWISH, SIGN_SWISH.derivative),
            replace(get_pair("bnn++"), source="mine"),
        ):
            assert compiled.compiled_forward(pair, False, rows) and compiled.compiled_backward(pair, rows)
        own = Unhashable(2.0)
        for pair in (
            heuristic(own, own),
            compose(own),
            compose(IDENTITY, own),
            replace(get_pair("bnn++"), forward=own),
        ):
            assert compiled.compiled_forward(pair, False, rows) is None


def test_a_function_within_another_is_not_the_other():
    """What calls or contains a function that the kernels know may do more; the polynomial itself contains the box."""

    class Half(Function):
        def __call__(self, w, mu):
            return 0.5 * self.function(w, mu)

    half = Half("half", SIGN_SWISH.function, "half of it", compiled="sign-swish")
    assert compiled_functions(heuristic(half, SIGN_SWISH)) is None
    assert compiled_functions(heuristic(SIGN_SWISH, half)) is None
    assert compiled_functions(compose(PERIOD, SIGN_SWISH)) is None
    assert compiled_functions(compose(BOX, POLYNOMIAL)) == compiled_functions(compose(IDENTITY, POLYNOMIAL))


def test_without_a_library_the_operators_run(monkeypatch):
    latent, grad = latent_of(3, 8), torch.randn(3, 8)
    without_kernels(monkeypatch)
    weight, slope = run(latent, get_pair("bnn++"), 2.0, grad)
    exact = run(latent.double(), get_pair("bnn++"), 2.0, grad.double())
    torch.testing.assert_close(weight, exact[0].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, exact[1].float(), rtol=1e-5, atol=1e-5)
