"""Which kernels work on a latent weight, and the operators around them: schema, shapes, compilation and errors."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from latent_rows import latent_of, number
from proxbit.errors import PackedFormatError
from proxbit.kernels import LatentRows, dispatch, native
from proxbit.kernels.interface import FUNCTIONS
from proxbit.quantizers import get_pair, quantize

OP = torch.ops.proxbit
MU = number(1.7)


@pytest.fixture(autouse=True)
def compiled_kernels():
    assert native() is not None, "These tests need the compiled kernels; install a C++ compiler."


@pytest.fixture
def graphs():
    """What a compiler was given, by the names of the operators, forward and backward."""
    torch.compiler.reset()
    return []


def compiled(function, graphs):
    def keep(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return make_boxed_func(graph)

    return torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))


def quantized(name):
    return lambda latent, mu: quantize(latent, mu, get_pair(name))


@pytest.mark.parametrize(
    ("scale", "given"),
    [("ls", (False, False)), ("fixed", (False, False)), ("ls", (True, False)), ("fixed", (True, True))],
)
def test_the_operators_are_the_kernels(scale, given):
    latent, grad = latent_of((5, 37)), torch.randn(5, 37)
    numbers = [torch.rand(5, 1) + 0.5 if is_given else None for is_given in given]
    for function in FUNCTIONS:
        arguments = function, latent, MU, scale, *numbers
        torch.library.opcheck(OP.quantize_rows.default, arguments, test_utils=("test_schema", "test_faketensor"))
        rows = LatentRows(function, latent, MU, *numbers)
        found, expected = OP.quantize_rows(*arguments), native().quantize_rows(rows, scale)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        arguments = function, latent, MU, *expected[1:], grad
        torch.library.opcheck(OP.gradient_rows.default, arguments, test_utils=("test_schema", "test_faketensor"))
        rows = LatentRows(function, latent, MU, *expected[1:])
        assert torch.equal(OP.gradient_rows(*arguments), native().gradient_rows(rows, grad))


def test_opcheck_of_all_there_is():
    latent, numbers = latent_of((5, 37)), torch.rand(5, 1)
    torch.library.opcheck(OP.quantize_rows.default, ("tanh", latent, MU, "ls", None, None))
    torch.library.opcheck(OP.gradient_rows.default, ("box", latent, MU, numbers, numbers, latent))


def test_latents_need_not_be_contiguous():
    latent, numbers = latent_of((7, 5)), torch.rand(5, 1) + 0.5
    plain = latent.t().contiguous()
    found, expected = (OP.quantize_rows("clip", each, MU, "ls", None, None)[0] for each in (latent.t(), plain))
    assert torch.equal(found, expected)
    found, expected = (OP.gradient_rows("box", each, MU, numbers, numbers, plain) for each in (latent.t(), plain))
    assert torch.equal(found, expected)


def test_torch_compile_sees_operators(graphs):
    latent = latent_of((4, 9)).requires_grad_()
    compiled(quantized("bnn++"), graphs)(latent, MU).sum().backward()
    assert "proxbit.quantize_rows.default" in graphs[0] and "proxbit.gradient_rows.default" in graphs[1]
    assert not any("sigmoid" in name for name in graphs[0] | graphs[1])


@pytest.mark.parametrize("latent", [torch.randn(4, 9).double(), torch.randn(4, 9).bfloat16(), torch.randn(0, 9)])
def test_torch_compile_of_what_the_kernels_do_not_take(latent, graphs):
    compiled(quantized("bnn++"), graphs)(latent.requires_grad_(), MU).sum().backward()
    assert not any("proxbit" in name for graph in graphs for name in graph)


def test_torch_compile_where_there_are_no_kernels(graphs, monkeypatch):
    latent = latent_of((4, 9)).requires_grad_()
    monkeypatch.setattr(dispatch, "native", lambda: None)
    compiled(quantized("bnn++"), graphs)(latent, MU).sum().backward()
    assert not any("proxbit" in name for graph in graphs for name in graph)
    with pytest.raises(PackedFormatError, match="one of the compiled kernels, without which this process runs"):
        OP.quantize_rows("sign", latent, MU, "ls", None, None)


@pytest.mark.parametrize("strict", [True, False])
def test_what_is_exported_has_none(strict):
    """It has to run where there is no proxbit."""

    class Quantized(torch.nn.Module):
        def forward(self, latent):
            return quantize(latent, MU, get_pair("bnn++"))

    program = torch.export.export(Quantized(), (latent_of((4, 9)),), strict=strict)
    assert not any("proxbit" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"function": "sine"}, "not 'sine' and 'ls'"),
        ({"scale": "mean"}, "not 'sign' and 'mean'"),
        ({"latent": torch.randn(4, 6).double()}, r"not \[4, 6\] in torch.float64"),
        ({"latent": torch.randn(4, 6, 1)}, r"not \[4, 6, 1\] in torch.float32"),
        ({"latent": torch.randn(0, 6)}, r"not \[0, 6\] in torch.float32"),
        ({"mu": torch.ones(2)}, r"with \[2\]"),
        ({"divisor": torch.ones(3, 1)}, r"\[4, 1\] in fp32, not \[3, 1\]"),
        ({"factor": torch.ones(4, 1).double()}, r"in fp32, not \[4, 1\] in torch.float64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments(change, message):
    """An error, before the library sees an address."""
    given = {"function": "sign", "latent": torch.randn(4, 6), "mu": MU, "scale": "ls", "divisor": None, "factor": None}
    with pytest.raises(PackedFormatError, match=message):
        OP.quantize_rows(**given | change)
    ones = {"divisor": torch.ones(4, 1), "factor": torch.ones(4, 1), "grad": torch.ones(4, 6)}
    if "scale" not in change:
        given.pop("scale")
        with pytest.raises(PackedFormatError, match=message):
            OP.gradient_rows(**given | ones | change)
