"""What is around the product: which of it is a submodule, and what a plain layer can take over."""

import copy

import pytest
import torch
from torch import nn

from proxbit.errors import ModelStateError
from proxbit.nn import ACTIVATIONS, Accumulator, BinaryLinear, PackedLinear
from proxbit.nn.surroundings import add_offset
from proxbit.quantizers import get_pair


def layer(**options):
    return BinaryLinear(6, 6, pair=get_pair("bnn"), **options)


@pytest.mark.parametrize("activations", list(ACTIVATIONS))
def test_only_what_learns_is_a_submodule(activations):
    for made in (layer(activations=activations), PackedLinear.from_latent(layer(activations=activations))):
        assert ("activation" in dict(made.named_children())) == ACTIVATIONS[activations].learns
        assert any(".activation." in f".{name}" for name in made.state_dict()) == ACTIVATIONS[activations].learns
        made.set_activation("float", layer().activation)
        assert dict(made.named_children()) == {} and made.activation.kernel == "float"


def test_a_residual_goes_into_the_weight_and_an_rprelu_does_not():
    made, x = layer(residual=True).eval(), torch.randn(3, 6)
    torch.testing.assert_close(made.to_float()(x), made(x))
    with pytest.raises(ModelStateError, match="RPReLU"):
        layer(rprelu=True).to_float()


def test_offsets():
    product, values, offset = torch.randn(2, 3), torch.randn(2, 4), torch.randn(3)
    assert add_offset(product, values, None) is product
    expected = product + nn.functional.linear(values, offset[:, None].expand(3, 4))
    torch.testing.assert_close(add_offset(product, values, offset), expected)


def test_copies_start_without_the_graph_of_a_penalty():
    made, x = layer(activations="sign", accumulator=Accumulator(2)), torch.randn(3, 6)
    expected = made(x)
    assert made.overflow_penalty.grad_fn is not None
    averaged = torch.optim.swa_utils.AveragedModel(made).module
    for twin in (copy.deepcopy(made), averaged, copy.copy(made)):
        assert twin.overflow_penalty is None and torch.equal(twin.overflow_share, made.overflow_share)
        assert torch.equal(twin(x), expected) and twin.overflow_penalty == made.overflow_penalty
    made.overflow_penalty.backward()
    assert made.weight.grad is not None
