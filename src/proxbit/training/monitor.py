"""What a training is watched by: flips, the distance of soft from hard weights, what is NaN, infinite or constant."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import gather
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from proxbit.errors import ActivationError, LossError
from proxbit.nn import BinaryLayer, LatentWeight, latent_layers
from proxbit.packing import pack_signs
from proxbit.plugin.sharded import full_latents
from proxbit.quantizers import RowUnits
from proxbit.shards import gathered, sum_of_rows

__all__ = [
    "LATENT_EDGES",
    "FiniteWatch",
    "FlipCounter",
    "hardening_gap",
    "latent_histogram",
    "layer_hardening_gap",
    "overflow_penalty",
    "overflow_shares",
    "watch_activations",
]

NEVER = torch.iinfo(torch.int64).max
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


class FiniteWatch:
    """Remembers the first optimizer step whose loss was NaN or infinite, on the device; `check` looks at it.

    In fp16 losses are not looked at: steps that overflow are skipped there. It is made once Accelerate has been set up.
    """

    def __init__(self) -> None:
        self.state = AcceleratorState()
        self.reset()

    def reset(self) -> None:
        """Begin anew, with a training."""
        self.first = torch.full((1,), NEVER, device=self.state.device)
        self.checked: int | None = None

    def see(self, loss: Tensor, step: int) -> None:
        """Look at a loss of one process, of the optimizer step with this number, from 1 on."""
        if self.state.mixed_precision != "fp16":
            self.first = torch.where(loss.detach().isfinite(), self.first, self.first.clamp(max=step))

    def check(self, step: int, model: nn.Module | None = None) -> None:
        """Raise, in every process, if any of them has met what is no number. All processes must call it.

        Args:
            step: optimizer steps that are done.
            model: to look at its parameters as well, once a step.

        Raises:
            LossError: naming rank and step, or the parameter.
        """
        first = _by_rank(self.first)
        if min(first) < NEVER:
            rank = first.index(min(first))
            raise LossError(
                f"The loss of rank {rank} was NaN or infinite at step {first[rank]}; nothing was saved after that. "
                "Lower learning_rate, or look at the images of that step; detect_anomalies=True names the layer."
            )
        if model is None or step == self.checked:
            return
        parameters = dict(model.named_parameters())
        finite = torch.stack([_local(parameter).isfinite().all() for parameter in parameters.values()])
        # The number of the first that is not, or how many there are.
        bad = _by_rank(torch.where(finite.all(), len(parameters), (~finite).int().argmax()).reshape(1))
        if min(bad) < len(parameters):
            rank = bad.index(min(bad))
            raise LossError(
                f"{list(parameters)[bad[rank]]} holds NaN or infinite values after step {step} (rank {rank}); it was "
                "not saved. Lower learning_rate, or set max_grad_norm."
            )
        self.checked = step


def _by_rank(value: Tensor) -> list[int]:
    """One number of each process."""
    return [int(each) for each in gather(value).tolist()]


def _local(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


def watch_activations(model: nn.Module) -> Callable[[], None]:
    """Check the input of every latent layer before each forward; this reads it once more, and waits for the device.

    Args:
        model: a latent model.

    Returns:
        A function that ends the watch.

    Raises:
        ActivationError: by the forward, naming the layer, for an input that holds NaN or infinity, or that is one
            constant (such as all zeros), of which no sign or step says anything.
    """
    handles = [layer.register_forward_pre_hook(partial(_check, name)) for name, layer in latent_layers(model)]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def _check(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
    input = arguments[0]
    assert isinstance(input, Tensor)
    if not input.numel():
        return
    low, high = (float(bound) for bound in input.detach().aminmax())
    if not -float("inf") < low <= high < float("inf"):
        raise ActivationError(f"{name}: its input holds NaN or infinite values (smallest {low}, largest {high}).")
    if low == high:
        raise ActivationError(f"{name}: its input is {low} everywhere: there is nothing to quantize.")
