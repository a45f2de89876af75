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
    swap(model, {"block.0": new})
    assert model.get_submodule("block.0") is new
    assert model["block"].layers == [new, *kept]


def test_a_module_of_the_root():
    model = FromAList()
    new = nn.Linear(4, 2)
    swap(model, {"2": new})
    assert model.layers[2] is new is model.get_submodule("2")


def test_an_unknown_name():
    model = FromAList()
    first = model.layers[0]
    with pytest.raises(AttributeError):
        swap(model, {"0": nn.ReLU(), "3": nn.ReLU()})
    assert model.get_submodule("0") is first is model.layers[0]


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


class Elsewhere(nn.Module):
    """Calls layers that it keeps in other ways than the parent of the layers does."""

    def __init__(self, keep):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.kept = keep(self.blocks)

    def forward(self, x):
        kept = self.kept.values() if isinstance(self.kept, dict) else self.kept
        for each in kept:
            x = each[-1](x) if isinstance(each, list | tuple) else each(x)
        return x


KEEP = {
    "list": list,
    "tuple": tuple,
    "dict": lambda blocks: dict(enumerate(blocks)),
    "pairs": lambda blocks: [("a", blocks[0]), ["b", blocks[1]]],
}


@pytest.mark.parametrize("keep", KEEP.values(), ids=list(KEEP))
def test_layers_that_are_called_by_another_reference(keep):
    torch.manual_seed(0)
    model, x = Elsewhere(keep).eval(), torch.randn(3, 4)
    kept, before = model.kept, model(x)
    proxbit.binarize(model)
    hard = model(x)
    assert not torch.allclose(hard, before)
    assert isinstance(kept, tuple) or model.kept is kept
    proxbit.pack(model)
    assert all(isinstance(layer, proxbit.nn.PackedLinear) for layer in model.blocks)
    torch.testing.assert_close(model(x), hard)
    torch.testing.assert_close(proxbit.dequantize(model)(x), hard)


def test_hooks_stay_and_can_be_taken_away():
    """Through all states, on the module in the place of the one they were given to."""
    model, x, seen = FromAList().eval(), torch.randn(3, 4), []
    before = model.layers[0].register_forward_pre_hook(lambda module, given: seen.append(type(module).__name__))
    behind = model.layers[2].register_forward_hook(lambda module, given, y: 0 * y)
    assert not model(x).any()
    for change, name in (
        (proxbit.binarize, "BinaryLinear"),
        (proxbit.pack, "PackedLinear"),
        (proxbit.dequantize, "Linear"),
    ):
        assert not change(model)(x).any()
        assert seen[-1] == name
    before.remove(), behind.remove()
    assert model(x).any()
    assert len(seen) == 4
