"""What is read in the source of a class: calls on arguments, and what a forward pass returns."""

import pytest
import torch
from torch import nn

from proxbit.patching.static_analysis import fed_arguments, returned, weights_read


class Feeds(nn.Module):
    """Calls some of its parts on what it is given, in a few spellings, and others on what it makes."""

    def other(self, tokens, numbers):
        return self.method(tokens) + self.made(numbers)

    def forward(self, ids, pictures=None, *, mask):
        flat = ids.view(-1)[:3]
        places = torch.arange(ids.shape[1])
        x = self.plain(ids) + self.sliced(ids[:, 1:].long()) + self.renamed(flat) + self.words[0](mask)
        x = x + self.counted(places) + self.buffered(self.places) + self.summed(mask.cumsum(1) - 1)
        return x + self.size(ids.size(1)) + self.other(ids, places)


def test_what_is_called_on_an_argument():
    assert fed_arguments(Feeds) == {"plain", "sliced", "renamed", "words.0", "method"}


class Again(nn.Module):
    """Methods that call each other, and themselves."""

    def deeper(self, x):
        return self.out(x) if x.is_floating_point() else self.deeper(x.float())

    def forward(self, x):
        return self.deeper(x)


def test_methods_that_call_themselves():
    assert fed_arguments(Again) == {"out"}
    assert returned(Again) == {("out",)}


class Straight(nn.Module):
    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.answer(x.mean(1))


class Wrapped(nn.Module):
    def forward(self, x):
        logits = torch.relu(self.softmax(self.answer(x)).squeeze(-1))
        return dict(logits=logits, boxes=[self.boxes(x)])


class Branches(nn.Module):
    def forward(self, x, fine):
        if fine:
            x = self.fine(x)
        else:
            with torch.no_grad():
                x = self.coarse(x)
        return x if fine else (self.loss(x), self.blocks[-1](x))


class Residual(nn.Module):
    def forward(self, x):
        x += self.first(x)
        return x + self.second(x)


class Loop(nn.Module):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("kind", "outer"),
    [
        (Straight, {"answer"}),
        (Wrapped, {"softmax", "boxes"}),
        (Branches, {"fine", "coarse", "loss", "blocks.*"}),
        (Residual, set()),
        (Loop, {"blocks.*"}),
    ],
)
def test_what_is_returned(kind, outer):
    assert {chain[0] for chain in returned(kind)} == outer


def test_what_went_into_what_is_returned():
    assert {chain for chain in returned(Wrapped) if "softmax" in chain} == {("softmax", "answer")}
    assert returned(Straight) == {("answer", "blocks.*", "first")}


def test_without_a_source():
    names = {"nn": nn}
    exec("class Block(nn.Module):\n    def forward(self, x):\n        return self.out(x) @ self.own.weight", names)
    assert fed_arguments(names["Block"]) == returned(names["Block"]) == weights_read(names["Block"]) == frozenset()
