"""Latent weights: what `BinaryLinear` and `BinaryConv2d` share, and functions on all latent layers of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Self

import torch
from torch import Tensor, nn

from proxbit.nn.activation_quantizer import ActivationQuantizer
from proxbit.nn.layer import BinaryLayer, geometry_of
from proxbit.nn.recompute import is_plain
from proxbit.quantizers import (
    HardRows,
    QuantizerPair,
    RecomputedWeight,
    RowUnits,
    check_rows,
    hard_rows,
    quantize,
    recomputed_weight,
    update_start,
)

__all__ = [
    "LatentWeight",
    "binary_activations",
    "evaluating",
    "latent_layers",
    "set_mu",
    "soft_evaluation",
    "start_update",
]


class LatentWeight(BinaryLayer):
    """A layer whose `weight` is the latent weight, and whose forward uses F_mu of it.

    Training mode uses the soft F_mu, until the layer is hardened. Evaluation mode uses the sign, which is what a packed
    model computes; inside `soft_evaluation` it uses F_mu too.

    Attributes:
        weight: the latent weight, `[rows, ...]`.
        pair: forward and backward quantizer.
        units: how rows are brought to numbers of order 1 and back.
        mu: sharpness, a 0-dimensional CPU tensor. It is no buffer: it belongs to the schedule, not to the checkpoint,
            and must not follow the dtype and device of the weights.
        hardened: training uses the sign as well.
        soft_eval: evaluation uses F_mu.
        waits: what is not quantized yet where F is soft: "weight", "activation", both or nothing.
        trained_soft: whether the last forward pass of a training, in this process, used F_mu.
    """

    weight: Tensor
    pair: QuantizerPair
    units: RowUnits
    mu: Tensor
    hardened: bool
    soft_eval: bool
    waits: frozenset[str]
    trained_soft: bool

    def __init__(self, *sizes: Any, pair: QuantizerPair, units: RowUnits, **arguments: Any) -> None:
        """Initialise the plain layer, then the quantizer, with mu at the start of its default schedule."""
        super().__init__(*sizes, **arguments)
        self.pair, self.units = pair, units
        self.mu = torch.tensor(pair.schedule[1], dtype=torch.float64, device="cpu")
        self.hardened = False
        self.soft_eval = False
        self.waits = frozenset()
        self.trained_soft = False

    @classmethod
    def from_float(cls, layer: nn.Module, pair: QuantizerPair, units: RowUnits, **options: Any) -> Self:
        """A latent layer that owns the parameters of `layer`; its weight becomes the latent weight."""
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        kind: dict[str, Any] = {"device": "meta", "dtype": weight.dtype, "bias": bias is not None}
        new = cls(pair=pair, **geometry_of(layer, cls.float_class), **asdict(units), **kind, **options)
        for part in new.children():
            part.to_empty(device=weight.device).reset_parameters()  # type: ignore[operator]
        # Behind the RPReLU: the states of optimizers in checkpoints go by the order of the parameters.
        new.set_activation(new.activation)
        new.weight, new.bias = weight, bias
        return new.train(layer.training)

    def reset_parameters(self) -> None:
        """Initialise as the float layer does; on the meta device there is nothing to do, and doing it takes time."""
        if not self.weight.is_meta:
            super().reset_parameters()  # type: ignore[misc]

    @property
    def is_hard(self) -> bool:
        """Whether the next forward uses the sign."""
        return self.hardened if self.training else not self.soft_eval

    def effective_weight(self, hard: bool | None = None) -> Tensor:
        """The weight of the forward pass, same shape and dtype as the latent, with the backward of the pair.

        Args:
            hard: use the sign, or F_mu. None: whichever the next forward uses.
        """
        hard = self._noted_hard() if hard is None else hard
        if "weight" in self.waits and not hard:
            return self.weight
        return quantize(self.weight, self.mu, self.pair, self.units, hard=hard)

    def forward_weight(self) -> Tensor | RecomputedWeight:
        """The weight of a forward pass, as a `RecomputedWeight` where the backward pass can compute it again."""
        hard = self._noted_hard()
        if is_plain() or ("weight" in self.waits and not hard):
            return self.effective_weight(hard)
        made = recomputed_weight(self.weight, self.mu, self.pair, self.units, hard=hard)
        return self.effective_weight(hard) if made is None else made

    def _noted_hard(self) -> bool:
        """`is_hard`, noted in `trained_soft` where it is a forward pass of a training."""
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.trained_soft = not self.is_hard
        return self.is_hard

    def one_bit_weight(self) -> nn.Parameter:
        with torch.no_grad():
            hard = self.effective_weight(hard=True)
        return nn.Parameter(hard, requires_grad=self.weight.requires_grad)

    @property
    def normalize(self) -> str:
        """`units.normalize`."""
        return self.units.normalize

    @property
    def scale(self) -> str:
        """`units.scale`."""
        return self.units.scale

    @property
    def center(self) -> str:
        """`units.center`."""
        return self.units.center

    def hard_rows(self) -> HardRows:
        """What is stored when the layer is packed: signs, scales and offsets of the rows."""
        return hard_rows(self.weight, self.units)

    @torch.no_grad()
    def start_update(self) -> None:
        """Before a step of the optimizer: put P(w*) in the place of w*, if the pair updates from there.

        A weight that is frozen, or has no gradient, stays: the optimizer passes over it.
        """
        if self.pair.update_from is not None and self.weight.requires_grad and self.weight.grad is not None:
            self.weight.copy_(update_start(self.weight, self.mu, self.pair, self.units, hard=self.is_hard))

    def check_latent(self, name: str) -> None:
        """Check that the latent weight can be binarized.

        Raises:
            LatentError: naming the layer, for NaN, infinite values, or a row that is all zero, also once its mean is
                taken off for good.
        """
        leave_out = f"the layer out with modules_to_not_convert=['{name}']"
        check_rows(self.weight, self.units.center, f"{name}.weight", leave_out)


def latent_layers(model: nn.Module) -> Iterator[tuple[str, LatentWeight]]:
    """The layers with latent weights, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, LatentWeight):
            yield name, module


def set_mu(model: nn.Module, mu: float, hard: bool = False) -> None:
    """Set the sharpness of every latent layer.

    Args:
        model: any module.
        mu: finite, in the range of every pair in use.
        hard: from now on use the sign in training too; B stays that of `mu`.

    Raises:
        MuRangeError: if mu is out of range; nothing is changed then.
    """
    layers = [layer for _, layer in latent_layers(model)]
    for pair in {id(layer.pair): layer.pair for layer in layers}.values():
        pair.check_mu(mu)
    for layer in layers:
        layer.mu.fill_(mu)
        layer.hardened = hard


def binary_activations(model: nn.Module) -> Iterator[tuple[str, ActivationQuantizer]]:
    """The quantizers of activations with two levels, with the names of their layers."""
    for name, layer in latent_layers(model):
        activation = getattr(layer, "activation", None)
        if isinstance(activation, ActivationQuantizer) and activation.binary:
            yield name, activation


def start_update(model: nn.Module) -> None:
    """Call `LatentWeight.start_update` of every latent layer: for loops without the Trainer, before `optimizer.step()`.

    Only ProxQuant and reverse ProxConnect need it; for every other pair it does nothing.
    """
    for _, layer in latent_layers(model):
        layer.start_update()


@contextmanager
def soft_evaluation(model: nn.Module) -> Iterator[None]:
    """Within the context, evaluation mode uses F_mu instead of the sign, in every latent layer of `model`."""
    layers = [layer for _, layer in latent_layers(model)]
    before = [layer.soft_eval for layer in layers]
    for layer in layers:
        layer.soft_eval = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.soft_eval = value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context, a model and all its modules are in evaluation mode; then each is in its own mode again.

    `model.train(mode)` would put a frozen part, which its owner keeps in evaluation mode, into training mode.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
