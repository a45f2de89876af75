"""What a run is watched by: how many signs flip, and how far the soft weights are from the hard ones."""

import torch
from torch import Tensor, nn

from proxbit.nn import BinaryLayer, LatentWeight
from proxbit.packing import pack_signs
from proxbit.plugin.sharded import full_latents
from proxbit.quantizers import RowUnits
from proxbit.shards import gathered, sum_of_rows

__all__ = [
    "LATENT_EDGES",
    "FlipCounter",
    "hardening_gap",
    "latent_histogram",
    "layer_hardening_gap",
    "overflow_penalty",
    "overflow_shares",
]

# Edges of the bins of `latent_histogram`: the first, the last, and how many bins lie between them.
LATENT_EDGES = (-3.0, 3.0, 41)


class FlipCounter:
    """Counts the latent weights whose sign has changed since the count before. Keeps one bit a weight.

    Args:
        model: a latent model.

    Attributes:
        ratios: of the last count, the flip ratio of each layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sizes: dict[str, int] = {}
        self.signs = self._signs()
        self.ratios: dict[str, float] = {}

    def _signs(self) -> dict[str, Tensor]:
        signs = {}
        for name, layer in full_latents(self.model):
            signs[name], self.sizes[name] = pack_signs(layer.hard_rows().values), layer.weight.numel()
        return signs

    def flip_ratio(self) -> float:
        """Flipped signs / latent weights since the last call (or since the counter was made), in [0, 1]."""
        before, self.signs = self.signs, self._signs()
        flips = {name: int(sum_of_rows(_ones, before[name] ^ signs)) for name, signs in self.signs.items()}
        self.ratios = {name: flipped / max(1, self.sizes[name]) for name, flipped in flips.items()}
        return sum(flips.values()) / max(1, sum(self.sizes.values()))


def _ones(packed: Tensor) -> Tensor:
    """How many bits are 1."""
    return torch.stack([((packed >> bit) & 1).sum() for bit in range(8)]).sum()


@torch.no_grad()
def latent_histogram(layer: LatentWeight) -> Tensor:
    r"""How the latent weights of a layer lie, in row units.

    Formula:
        counts of w / mean |w| of its row, where rows are centred if the layer centres them: below -3, in 41 bins of
        equal width from -3 to 3, from 3 on. What is not a number is not counted.

    Returns:
        `[43]`, int64, on the device of the weight.
    """
    return sum_of_rows(lambda rows: _histogram(rows, layer.units), layer.weight)


def _histogram(weight: Tensor, units: RowUnits) -> Tensor:
    low, high, bins = LATENT_EDGES
    rows = weight.flatten(1).float()
    rows = rows - units.offset(rows)
    places = (rows / RowUnits().divisor(rows)).sub_(low).mul_(bins / (high - low)).floor_().clamp_(-1, bins)
    return torch.bincount(places.nan_to_num_(nan=bins + 1).long().add_(1).flatten(), minlength=bins + 3)[:-1]


@torch.no_grad()
def layer_hardening_gap(layer: LatentWeight) -> tuple[Tensor, Tensor]:
    r"""How far F_mu is from the sign in one layer.

    Returns:
        \sum |w_soft - w_hard| and \sum |w_hard|, both 0-dimensional.
    """
    soft, hard = layer.effective_weight(hard=layer.hardened), layer.effective_weight(hard=True)
    return gathered((soft - hard).abs().sum()), gathered(hard.abs().sum())


def hardening_gap(model: nn.Module) -> float:
    r"""How far the weights that train are from those that ship, over all latent layers.

    Formula:
        \sum |w_soft - w_hard| / \sum |w_hard|;   0 once the model is hard.
    """
    parts = [layer_hardening_gap(layer) for _, layer in full_latents(model)]
    distance = sum(float(part[0]) for part in parts)
    size = sum(float(part[1]) for part in parts)
    return distance / size if size else 0.0


def overflow_shares(model: nn.Module) -> dict[str, float]:
    """The share of the sums of the last forward pass that did not fit, of each layer with a narrow accumulator."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, BinaryLayer))
    return {name: float(layer.overflow.share) for name, layer in layers if layer.overflow is not None}


def overflow_penalty(model: nn.Module) -> Tensor:
    """By how much these sums did not fit, on average over the layers, 0-dimensional; 0 if there are none."""
    seen = [layer.overflow for layer in model.modules() if isinstance(layer, BinaryLayer)]
    found = [overflow.penalty for overflow in seen if overflow is not None and overflow.penalty is not None]
    return torch.stack(found).mean() if found else torch.zeros(())
