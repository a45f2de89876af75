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


class OwnLayerNorm(nn.LayerNorm):
    """The same, in its own way, as timm has it."""

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class ScaledLayerNorm(nn.LayerNorm):
    """Something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def affine(kind=nn.LayerNorm):
    norm = kind(D)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm
