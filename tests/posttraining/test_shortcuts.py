"""Residual streams, seen in one forward pass."""

import pytest
import torch
from torch import nn

from proxbit.patching.trace import trace
from proxbit.posttraining.shortcuts import Shortcut, shortcuts
from tiny_models import FAMILIES, SIDE


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.norm, self.up, self.down, self.kind = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6), kind
        self.gamma = nn.Parameter(torch.full((6,), 0.5))
        self.after = nn.LayerNorm(6)

    def forward(self, x):
        h = x * 2
        y = self.down(torch.relu(self.up(self.norm(h))))
        if self.kind == "plain":
            return h + y
        if self.kind == "scaled":
            return self.gamma * y + h
        if self.kind == "normed":
            return h + self.after(y)
        if self.kind == "read twice":
            return h + y * y.mean()
        return h - y


@pytest.mark.parametrize("kind, gain", [("plain", 1.0), ("scaled", 0.5)])
def test_what_is_added(kind, gain):
    model = Block(kind)
    found = shortcuts(trace(model, {"x": torch.randn(3, 6)}), {"down": model.down, "up": model.up})
    assert list(found) == ["down"] and found["down"].module == "norm"
    assert found["down"].gain.unique().tolist() == [gain]


@pytest.mark.parametrize("kind", ["normed", "read twice", "subtracted"])
def test_what_is_no_shortcut(kind):
    model = Block(kind)
    assert shortcuts(trace(model, {"x": torch.randn(3, 6)}), {"down": model.down}) == {}


def test_a_layer_that_is_called_twice_has_none():
    block = Block("plain")
    model = nn.Sequential(block, block)
    assert shortcuts(trace(model, {"input": torch.randn(3, 6)}), {"0.down": block.down}) == {}


def test_half_of_what_lacks_is_wanted():
    shortcut = Shortcut("norm", torch.tensor([1.0, 0.5, 0.0]))
    wanted = shortcut.wanted(torch.ones(2, 3), torch.full((2, 3), 4.0), 0.5)
    assert wanted[0].tolist() == [3.0, 5.0, 1.0]


def test_both_halves_of_a_transformer_block_write_into_the_stream():
    model = FAMILIES["vit"]()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in name}
    found = shortcuts(trace(model, {"pixel_values": torch.rand(1, 3, SIDE, SIDE)}), layers)
    assert sorted(found) == sorted(f"vit.layers.{i}.{part}" for i in (0, 1) for part in ("attention.o_proj", "mlp.fc2"))
