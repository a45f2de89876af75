"""The base class of activation quantizers; by itself it leaves the activations as they are."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxbit.errors import ConfigError
from proxbit.kernels import Levels
from proxbit.nn.learned import Learned
from proxbit.nn.recompute import RowRecipe, is_plain, kernel_recipe, linear, product
from proxbit.quantizers import QuantizerPair, RecomputedWeight, get_pair

__all__ = ["DEFAULT_ACTIVATION_PAIR", "ActivationQuantizer", "Folded", "Total"]

# Sums, in fp64, of what a function gives for each part of all inputs: `total(lambda x: [x.sum()])`.
Total = Callable[[Callable[[Tensor], Sequence[Tensor]]], list[Tensor]]

DEFAULT_ACTIVATION_PAIR = "bireal"


class Folded(NamedTuple):
    """Scale and bias of a packed layer, with the learned numbers of its activation quantizer folded in.

    Attributes:
        scale: `[O]`.
        bias: `[O]` or None.
        levels: of the activations: thresholds of signs, `[I]`; step, lowest and highest code of whole numbers, `[3]`;
            None for what the operator does without.
    """

    scale: Tensor
    bias: Tensor | None
    levels: Tensor | None = None


class ActivationQuantizer(Learned):
    """Float activations, left as they are; the other formats are subclasses.

    Args:
        columns: `I`, the width of the input.
        pair: F and B of the binary ones; for the others there is nothing to choose.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        format: its key in `ACTIVATIONS`.
        kernel: the format of activations that the operator multiplies: "float", "int8" or "sign".
        learns: whether there are parameters, and `calibrate` has something to set.
        binary: whether there are two levels, and a pair.
        mu: sharpness of the pair, see `LatentWeight.mu`.
    """

    format = "float"
    kernel = "float"
    learns = False
    binary = False

    def __init__(
        self,
        columns: int,
        pair: QuantizerPair | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.columns = columns
        self.pair = get_pair(DEFAULT_ACTIVATION_PAIR) if pair is None else pair
        self.mu = torch.tensor(self.pair.schedule[1], dtype=torch.float64, device="cpu")
        self.calibrated = False
        self.make_parameters({"device": device, "dtype": dtype})

    def make_parameters(self, kind: dict[str, Any]) -> None:
        """Make the parameters, on a device and of a dtype."""

    def reset_parameters(self) -> None:
        """Set the parameters to what suits inputs of mean 0 and variance 1."""

    def calibrate(self, x: Tensor, may_shift: bool = True) -> None:
        """Set the parameters by inputs.

        Args:
            x: `[..., I]`.
            may_shift: whether a constant may be taken off the input, see `shift`.
        """

    def fit(self, total: Total, may_shift: bool = True) -> None:
        """Set the parameters by inputs where the weights are fitted to the result afterwards.

        Args:
            total: sums over all inputs, which come in parts `[..., I]`.
            may_shift: whether the layer can take up a constant.
        """

    @property
    def shift(self) -> Tensor | None:
        """What is taken off the input, `[I]`, and given back by the bias of the layer; None for nothing."""
        return None

    def forward(self, x: Tensor, hard: bool = True) -> Tensor:
        """What the layer multiplies, as floats, with a gradient.

        Args:
            x: `[..., I]`.
            hard: levels; without, F of the pair, where there is one.

        Returns:
            Same shape and dtype.
        """
        return x

    def linear(self, x: Tensor, weight: Tensor | RecomputedWeight, bias: Tensor | None, hard: bool = True) -> Tensor:
        """The product of `forward` and a weight; for the backward pass x is saved, and not what `forward` makes of it.

        Args:
            x: `[..., I]`.
            weight: `[O, I]`.
            bias: `[O]` or None.
            hard: as in `forward`.

        Returns:
            `[..., O]`.
        """
        if is_plain() or self.format == "float":
            return linear(self(x, hard), weight, bias)
        rows = x.reshape(-1, self.columns)
        numbers = self.numbers()
        by_kernel = kernel_recipe(self.levels(hard), numbers, rows)
        if by_kernel is not None:
            result = product(by_kernel, (*numbers, rows), weight, bias)
        else:
            learned = dict(self.named_parameters())

            def forward(*tensors: Tensor) -> tuple[Tensor]:
                # On a copy, where the parameters can be replaced: backward passes of other threads use the module too.
                twin = copy.copy(self)
                twin.__dict__["_parameters"] = dict(zip(learned, tensors[:-1], strict=True))
                return (twin(tensors[-1], hard),)

            recipe = RowRecipe(forward, self.columns, len(learned), rows.device.type)
            result = product(recipe, (*learned.values(), rows), weight, bias)
        return result.view(*x.shape[:-1], result.shape[-1])

    def levels(self, hard: bool) -> Levels | None:
        """What the compiled kernels make of the input; None where they do not know it."""
        return None

    def numbers(self) -> tuple[Tensor, ...]:
        """What that is made with, with gradients: the scale, `[1]`, and the threshold, `[I]`, if there are any."""
        return ()

    def parts(self, x: Tensor, hard: bool = True) -> tuple[Tensor, Tensor]:
        """`forward` as codes times their unit; codes are whole numbers where `hard`.

        Args:
            x: `[..., I]`.
            hard: as in `forward`.

        Returns:
            `[..., I]`, and one number, or one a token, `[..., 1]`.

        Raises:
            ConfigError: for floats, which have no codes.
        """
        raise ConfigError("Float activations are no whole numbers: they have no codes.")

    def fold(self, scale: Tensor, bias: Tensor | None, weight: Tensor) -> Folded:
        """The arguments of an operator on packed weights: with them it computes what `forward` simulates.

        Args:
            scale: `[O]`, of the weights.
            bias: `[O]` or None.
            weight: the bits, `[O, ceil(I / 8)]`, uint8.
        """
        return Folded(scale, bias)

    def extra_repr(self) -> str:
        return f"columns={self.columns}"
