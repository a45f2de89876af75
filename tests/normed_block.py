"""A small block in which a layer normalization has linear layers, and perhaps other things, behind it."""

from torch import nn

D = 24


class Normed(nn.Module):
    """A layer normalization with something behind it."""

    def __init__(self, norm, peek=False, give=False, twice=False):
        super().__init__()
        self.norm, self.first, self.second = norm, nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.peek, self.give, self.twice = peek, give, twice

    def forward(self, x):
        hidden = self.norm(self.norm(x) if self.twice else x)
        result = self.first(hidden) * self.second(hidden) + x
        if self.peek:
            result = result + hidden
        return (result, hidden) if self.give else result


def affine():
    norm = nn.LayerNorm(D)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm
