"""The operators in plain torch: the same results, and only operators of torch when they are traced."""

from operator import getitem

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from proxbit.kernels import decompositions, pack_signs

ROWS, COLUMNS = 6, 13
OPERATORS = torch.ops.proxbit


def arguments(operator):
    """By what the schema calls them."""
    values = {
        "x": torch.randn(2, 3, COLUMNS),
        "weight": pack_signs(torch.randn(ROWS, COLUMNS)),
        "packed": pack_signs(torch.randn(ROWS, COLUMNS)),
        "scale": torch.rand(ROWS),
        "bias": torch.randn(ROWS),
        "threshold": torch.randn(COLUMNS),
        "grid": torch.tensor([0.3, -8.0, 7.0]),
        "gelu": True,
        "norm_weight": torch.randn(COLUMNS),
        "norm_bias": torch.randn(COLUMNS),
        "norm_eps": 1e-5,
        "columns": COLUMNS,
        "dtype": torch.float32,
    }
    return [values[argument.name] for argument in operator._schema.arguments]


def bare(given):
    """Without what a linear operator may have besides: bias, levels, GELU and normalization."""
    return [*given[:3], *[None] * (len(given) - 7)]


@pytest.mark.parametrize("operator", decompositions(), ids=str)
def test_the_same_in_plain_torch(operator):
    given, function = arguments(operator), decompositions()[operator]
    for each in [given, bare(given)] if "linear" in str(operator) else [given]:
        torch.testing.assert_close(function(*each), operator(*each), rtol=1e-5, atol=1e-5)
    traced = make_fx(operator, decomposition_table=decompositions())(*given)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"} - {getitem}
    assert called != set()
    assert {target.namespace for target in called} == {"aten"}
    assert not any(target._schema.is_mutable for target in called)


def test_every_operator_of_a_packed_model_is_there():
    """Those without a gradient's part, and without packing, which an exported model does not do."""
    names = {"linear_w1", "linear_w1a8", "linear_w1a1", "unpack_signs", "unpack_weight"}
    assert set(decompositions()) == {getattr(OPERATORS, name).default for name in names}
