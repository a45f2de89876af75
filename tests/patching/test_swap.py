"""Replacing a module where it is registered, and where its parent keeps it besides."""

import pytest
import torch
from torch import nn

import proxbit
from proxbit.patching import packed_layers
from proxbit.patching.swap import swap


class FromAList(nn.Module):
    """Calls its children as some layers of transformers do: from a list, and not by their names."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)]
        for i, layer in enumerate(self.layers):
            self.add_module(str(i), layer)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_list_follows_the_names():
    model = nn.ModuleDict({"block": FromAList()})
    new, kept = nn.Linear(4, 4), model["block"].layers[1:]
    swap(model, "block.0", new)
    assert model.get_submodule("block.0") is new
    assert model["block"].layers == [new, *kept]


def test_a_module_of_the_root():
    model = FromAList()
    new = nn.Linear(4, 2)
    swap(model, "2", new)
    assert model.layers[2] is new is model.get_submodule("2")


def test_an_unknown_name():
    with pytest.raises(AttributeError):
        swap(FromAList(), "3", nn.ReLU())


def test_what_is_called_is_what_was_converted():
    """Through all states: the layers of the list are those that carry the names, and so compute signs."""
    model, x = FromAList().eval(), torch.randn(3, 4)
    weight = model.layers[2].weight.detach().clone()
    proxbit.pack(proxbit.binarize(model))
    assert [layer for _, layer in packed_layers(model)] == [model.layers[0], model.layers[2]]
    hidden = torch.randn(3, 4)
    signs = torch.where(weight >= 0, 1.0, -1.0) * weight.abs().mean(dim=1, keepdim=True)
    torch.testing.assert_close(model.layers[2](hidden), hidden @ signs.T + model.layers[2].bias)
    before = model(x)
    torch.testing.assert_close(proxbit.dequantize(model)(x), before)
    assert [type(layer) for layer in model.layers] == [nn.Linear, nn.ReLU, nn.Linear]
