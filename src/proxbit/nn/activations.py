"""Activation quantizers: they quantize the input of a 1-bit linear layer.

Each is a module with learned numbers, and defines the same function twice: `forward` simulates it on floats, with a
gradient; `fold` gives the arguments with which an operator on packed weights computes it.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.errors import ConfigError
from proxbit.kernels import INT8, Levels, quantize_activations, round_activations, unpack_signs
from proxbit.nn.activation_quantizer import ActivationQuantizer, Folded, Total
from proxbit.nn.learned import SMALLEST, lsq_scale
from proxbit.nn.surrogate import binarize_units, clip, straight_through
from proxbit.quantizers import QuantizerPair, compiled_functions
from proxbit.sign import sign

__all__ = ["ACTIVATIONS", "check_activations", "fitted_upper_level", "make_activation", "upper_level"]


class Int8Activation(ActivationQuantizer):
    r"""Symmetric int8, each token by its own largest value: q = round(x / step), step = max |x| / 127; a = step q.

    Backward: straight through.
    """

    format = kernel = "int8"

    def levels(self, hard: bool) -> Levels:
        return INT8

    def forward(self, x: Tensor, hard: bool = True) -> Tensor:
        return straight_through(round_activations(x), x)

    def parts(self, x: Tensor, hard: bool = True) -> tuple[Tensor, Tensor]:
        q, step = quantize_activations(x.detach())
        units = x.float() / torch.where(step > 0, step, 1)
        return units + (q - units).detach(), step


class Int4Activation(ActivationQuantizer):
    r"""Four bits with a learned step: q = clip(round(x / step), -8, 7); a = step q.

    Backward: to x straight through where it is not clipped; to the step q - x / step there, and q where it is.

    Source:
        LSQ: Esser, McKinstry, Bablani, Appuswamy, Modha, Learned Step Size Quantization, ICLR 2020, equations 1 to 3.
    """

    format = "int4"
    kernel = "int8"
    learns = True
    low, high = -8, 7
    step: nn.Parameter

    def make_parameters(self, kind: dict[str, Any]) -> None:
        self.step = nn.Parameter(torch.empty(1, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._set_step(math.sqrt(2 / math.pi))

    def calibrate(self, x: Tensor, may_shift: bool = True) -> None:
        self._set_step(float(x.float().abs().mean()))

    def fit(self, total: Total, may_shift: bool = True) -> None:
        """The step with the least squared error, of 64 from one that clips nearly all to one that clips nothing."""
        (power,) = total(lambda x: [torch.stack([x.double().square().sum(), x.new_tensor(x.numel()).double()])])
        size = math.sqrt(float(power[0] / power[1]))
        steps = max(size, SMALLEST) * torch.logspace(-1.3, 0.7, 64).to(power)

        def errors(x: Tensor) -> list[Tensor]:
            tokens = x.flatten(0, -2).float()
            tokens = tokens[:: -(-len(tokens) // 256)]
            made = [(tokens / step).round().clamp(self.low, self.high) * step - tokens for step in steps.float()]
            return [torch.stack([each.square().sum() for each in made])]

        with torch.no_grad():
            self.step.fill_(float(steps[total(errors)[0].argmin()]))

    def _set_step(self, mean: float) -> None:
        with torch.no_grad():
            self.step.fill_(max(2 * mean / math.sqrt(self.high), SMALLEST))

    def _step(self) -> Tensor:
        """Positive, with the gradient scale of LSQ."""
        return lsq_scale(self.step, self.columns * self.high)

    def levels(self, hard: bool) -> Levels:
        return Levels("grid", codes=(self.low, self.high))

    def numbers(self) -> tuple[Tensor, ...]:
        return (self._step(),)

    def parts(self, x: Tensor, hard: bool = True) -> tuple[Tensor, Tensor]:
        step = self._step().to(torch.promote_types(x.dtype, torch.float32))
        clipped = clip(x.to(step.dtype) / step, self.low, self.high)
        return clipped + (clipped.round() - clipped).detach(), step

    def forward(self, x: Tensor, hard: bool = True) -> Tensor:
        codes, step = self.parts(x)
        return (codes * step).to(x.dtype)

    def fold(self, scale: Tensor, bias: Tensor | None, weight: Tensor) -> Folded:
        step = self._step().to(torch.promote_types(self.step.dtype, torch.float32))
        return Folded(scale, bias, torch.cat([step, torch.full_like(step, self.low), torch.full_like(step, self.high)]))


class UInt4Activation(Int4Activation):
    """`Int4Activation` for inputs that are not negative, or hardly: the levels are 0 to 15 steps."""

    format = "uint4"
    low, high = 0, 15


class SignActivation(ActivationQuantizer):
    r"""Signs around a learned threshold for every channel, times one learned scale.

    Formula:
        a = scale F((x - threshold) / scale),   F = sign: +1 where x \ge threshold, else -1

    Backward: to x the B of the pair; to the threshold minus that, summed; to the scale the sum of F.

    Source:
        threshold: RSign, Liu, Shen, Savvides, Cheng, ReActNet, ECCV 2020, section 4.2; scale: Liu et al., BiT, NeurIPS
        2022, section 2.2.
    """

    format = kernel = "sign"
    kind = "signs"
    learns = True
    binary = True
    threshold: nn.Parameter
    scale: nn.Parameter

    def make_parameters(self, kind: dict[str, Any]) -> None:
        self.threshold = nn.Parameter(torch.empty(self.columns, **kind))
        self.scale = nn.Parameter(torch.empty(1, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.threshold.zero_()
            self.scale.fill_(math.sqrt(2 / math.pi))

    @property
    def shift(self) -> Tensor | None:
        return self.threshold.detach()

    def calibrate(self, x: Tensor, may_shift: bool = True) -> None:
        x = x.float()
        with torch.no_grad():
            self.threshold.copy_(x.mean(dim=tuple(range(x.dim() - 1)))) if may_shift else self.threshold.zero_()
            self.scale.fill_(max(float((x - self.threshold.float().cpu()).abs().mean()), SMALLEST))

    def fit(self, total: Total, may_shift: bool = True) -> None:
        """The threshold is the mean of each channel, or 0 where no bias can take it up; the scale the mean distance."""
        threshold = _means(total) if may_shift else torch.zeros_like(self.threshold)
        with torch.no_grad():
            self.threshold.copy_(threshold)
            self.scale.fill_(max(_mean_distance(total, self.threshold), SMALLEST))

    def _positive_scale(self) -> Tensor:
        return lsq_scale(self.scale, self.columns)

    def _boundary(self) -> Tensor:
        """From where on the upper level is taken, `[I]`."""
        return self.threshold

    def _units(self, x: Tensor) -> Tensor:
        """x in units whose levels are -1 and +1, with the gradient of what is learned."""
        size = self._positive_scale().detach()
        return torch.addcmul(-self.threshold / size, x, 1 / size)

    def levels(self, hard: bool) -> Levels | None:
        functions = compiled_functions(self.pair)
        if functions is None:
            return None
        forward, backward = functions
        return Levels(self.kind, None if hard else forward, backward, self.mu)

    def numbers(self) -> tuple[Tensor, ...]:
        return self._positive_scale(), self.threshold

    def _two_levels(self, x: Tensor, hard: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        levels = sign(x.to(wide), self._boundary().detach().to(wide))
        if hard and not torch.is_grad_enabled():
            return levels
        return binarize_units(self._units(x.to(wide)), levels, self.mu, self.pair, hard)

    def parts(self, x: Tensor, hard: bool = True) -> tuple[Tensor, Tensor]:
        return self._two_levels(x, hard), self._positive_scale()

    def forward(self, x: Tensor, hard: bool = True) -> Tensor:
        codes, scale = self.parts(x, hard)
        return (codes * scale).to(x.dtype)

    def fold(self, scale: Tensor, bias: Tensor | None, weight: Tensor) -> Folded:
        return Folded(scale * self._positive_scale().to(scale.dtype), bias, self._boundary())


class ElasticActivation(SignActivation):
    r"""Zero or a learned scale, for inputs that are not negative, or hardly: there a sign around 0 would be constant.

    Formula:
        a = scale (1 + F(2 (x - threshold) / scale - 1)) / 2,   F = sign: a = scale where x \ge threshold + scale / 2

    Backward: to x the B of the pair; to the scale what the chain rule gives, for the box 1[|u| \le 1] that is LSQ.

    Source:
        Liu et al., BiT: Robustly Binarized Multi-distilled Transformer, NeurIPS 2022, section 2.2, equation of the
        elastic binarization of non-negative activations.
    """

    format = "elastic"
    kind = "zero or one"

    @property
    def shift(self) -> Tensor | None:
        return None

    def calibrate(self, x: Tensor, may_shift: bool = True) -> None:
        values = x.float()
        scale = upper_level(values, float(values.clamp(min=0).mean()) * 2)
        with torch.no_grad():
            self.threshold.zero_()
            self.scale.fill_(max(scale, SMALLEST))

    def fit(self, total: Total, may_shift: bool = True) -> None:
        """The upper level is taken above the mean of each channel; without a bias, zero and the level nearest to x."""
        with torch.no_grad():
            if may_shift:
                middle = _means(total)
                self.scale.fill_(max(2 * _mean_distance(total, middle), SMALLEST))
                self.threshold.copy_(middle - self.scale.double() / 2)
            else:
                self.threshold.zero_()
                self.scale.fill_(max(fitted_upper_level(total), SMALLEST))

    def _boundary(self) -> Tensor:
        return self.threshold + self._positive_scale() / 2

    def _units(self, x: Tensor) -> Tensor:
        half = self._positive_scale() / 2
        return torch.addcmul(-self.threshold / half - 1, x, 1 / half)

    def parts(self, x: Tensor, hard: bool = True) -> tuple[Tensor, Tensor]:
        return (self._two_levels(x, hard) + 1) / 2, self._positive_scale()

    def fold(self, scale: Tensor, bias: Tensor | None, weight: Tensor) -> Folded:
        half = scale * (self._positive_scale() / 2).to(scale.dtype)
        constant = half * unpack_signs(weight, self.columns).sum(dim=1).to(half.dtype)
        return Folded(half, constant if bias is None else bias + constant, self._boundary())


def upper_level(values: Tensor, start: float) -> float:
    """The s of the two levels 0 and s that are nearest to some values, in least squares."""
    return _upper_level(lambda function: list(function(values)), start)


def fitted_upper_level(total: Total) -> float:
    """The same of all inputs, from twice the mean of those above 0 on."""
    (sums,) = total(lambda x: [torch.stack([x.double().clamp(min=0).sum(), x.new_tensor(x.numel()).double()])])
    return _upper_level(total, 2 * float(sums[0] / sums[1]))


def _upper_level(total: Total, start: float) -> float:
    level = start
    for _ in range(10):
        # The best s is the mean of what lies above s / 2.
        def above(x: Tensor, half: float = level / 2) -> list[Tensor]:
            high = x >= half
            return [torch.stack([torch.where(high, x, 0).double().sum(), high.double().sum()])]

        (sums,) = total(above)
        level = float(sums[0] / sums[1]) if sums[1] > 0 else level / 2
    return level


def _means(total: Total) -> Tensor:
    """Of each channel, `[I]`, fp64."""

    def sums(x: Tensor) -> list[Tensor]:
        tokens = x.flatten(0, -2)
        return [tokens.sum(dim=0, dtype=torch.float64), tokens.new_tensor(len(tokens)).double()]

    found, count = total(sums)
    return found / count


def _mean_distance(total: Total, middle: Tensor) -> float:
    """Mean |x - middle| over all channels."""

    def sums(x: Tensor) -> list[Tensor]:
        return [torch.stack([(x.double() - middle).abs().sum(), x.new_tensor(x.numel()).double()])]

    (found,) = total(sums)
    return float(found[0] / found[1])


ACTIVATIONS: dict[str, type[ActivationQuantizer]] = {
    kind.format: kind
    for kind in (
        ActivationQuantizer,
        Int8Activation,
        Int4Activation,
        UInt4Activation,
        SignActivation,
        ElasticActivation,
    )
}


def check_activations(activations: str) -> None:
    """Raise ConfigError for a format that does not exist."""
    if activations not in ACTIVATIONS:
        raise ConfigError(f"activations must be one of {', '.join(ACTIVATIONS)}; not {activations!r}.")


def make_activation(
    activations: str,
    columns: int,
    pair: QuantizerPair | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ActivationQuantizer:
    """The quantizer of that name, see `ActivationQuantizer`.

    Raises:
        ConfigError: for a format that does not exist, or a pair that has other levels than -1 and +1.
    """
    check_activations(activations)
    if pair is not None and ACTIVATIONS[activations].binary and not pair.binary:
        raise ConfigError(f"Activations with two levels need a pair with the levels -1 and +1, not {pair.levels}.")
    return ACTIVATIONS[activations](columns, pair, device=device, dtype=dtype)
