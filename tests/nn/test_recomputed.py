"""What is computed again in the backward pass: the same gradients, and less memory."""

import pytest
import torch

from proxbit.nn import BinaryLinear
from proxbit.nn.attention import binary_attention, int8_attention
from proxbit.nn.recomputed import recomputed
from proxbit.quantizers import get_pair


def kept(call):
    """Elements that are kept for the backward pass of a call, and its result."""
    sizes = {}

    def note(tensor):
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = call()
    return sum(sizes.values()), result


def test_the_same_values_and_gradients():
    x, y = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    calls = []

    def function(x, y):
        calls.append(torch.is_grad_enabled())
        return (x * y).exp(), torch.nn.functional.dropout(x.sin() * y, 0.5)

    torch.manual_seed(1)
    plain = function(x, y)
    expected = torch.autograd.grad(sum(each.sum() for each in plain), (x, y))
    torch.manual_seed(1)
    results = recomputed(function, x, y, random=True)
    assert all(torch.equal(*pair) for pair in zip(results, plain, strict=True)) and len(calls) == 2
    found = torch.autograd.grad(sum(each.sum() for each in results), (x, y))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)) and len(calls) == 3
    with torch.no_grad():
        recomputed(function, x, y)
    assert calls[3:] == [False]


@pytest.mark.parametrize("activations", ["int8", "int4", "sign", "elastic"])
def test_a_linear_layer_keeps_its_input_only(activations):
    """And the weight; of a float layer it is the same."""
    layer = BinaryLinear(64, 8, pair=get_pair("bnn++"), activations=activations).train()
    x = torch.randn(100, 64, requires_grad=True)
    elements, _ = kept(lambda: layer(x))
    assert 100 * 64 <= elements <= 100 * 64 + 2 * 8 * 64 + 300


@pytest.mark.parametrize("attention", [int8_attention, binary_attention], ids=["int8", "binary"])
def test_attention_keeps_no_probabilities(attention):
    module = torch.nn.Identity().train()
    q, k, v = (torch.randn(1, 2, 200, 4, requires_grad=True) for _ in range(3))
    elements, _ = kept(lambda: attention(module, q, k, v, None)[0])
    assert elements <= 4 * q.numel() < 2 * 200 * 200
