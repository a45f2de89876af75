"""Fitting one layer, at the moment when all forward passes have come to it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.errors import ConfigError
from proxbit.nn import BinaryConv2d, BinaryLinear, LatentWeight
from proxbit.posttraining.closed_form import align, compensate
from proxbit.posttraining.moments import Gathered, Moments, moments
from proxbit.posttraining.report import LayerFit
from proxbit.posttraining.rows import latents, rounding_of

__all__ = ["Float", "Layer", "fit_norm", "layer_of"]

# Of the mean variance of the inputs: the ridge of the alignment. Where inputs are signs, more data speak for less.
RIDGE, RIDGE_OF_SIGNS = 0.03, 0.007
# Rows that are rounded at a time.
ROWS = 512
# Of the power of a signal: what varies less is rounding.
CONSTANT = 1e-9
# Positions of a convolution, in multiples of its columns: neighbours are much alike.
POSITIONS = 64


@dataclass(frozen=True)
class Float:
    """A layer before anything was fitted: its weight, and its bias if it has one."""

    weight: Tensor
    bias: Tensor | None

    def placed(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """An input, the weight and the bias in one dtype, that of the model: latent weights are in single precision."""
        dtype = input.dtype if self.bias is None else self.bias.dtype
        return input.to(dtype), self.weight.to(dtype), self.bias


class Layer(ABC):
    """A latent layer as rows and columns, whatever its shape.

    Args:
        module: the layer.
        original: what it was.
        takes_means: whether a bias, or a batch norm behind it, takes up a constant.
        calls: how often it is called in a forward pass: it is fitted anew each time, to all inputs so far.
    """

    groups = 1

    def __init__(self, module: LatentWeight, original: Float, takes_means: bool, calls: int = 1) -> None:
        self.module, self.original, self.takes_means, self.calls = module, original, takes_means, calls
        self.known: Moments | None = None
        self.before: float | None = None
        self.ridge = RIDGE

    @abstractmethod
    def floating(self, input: Tensor) -> Tensor:
        """What the float layer gives."""

    @abstractmethod
    def fit_inputs(self, gathered: Gathered) -> None:
        """Set what the layer makes of its inputs."""

    @abstractmethod
    def inputs(self, input: Tensor) -> Tensor:
        """What the layer multiplies, `[n, G, I]`."""

    @abstractmethod
    def outputs(self, output: Tensor, input: Tensor) -> Tensor:
        """What its products are to be, where its output is to be that, `[n, G, O]`."""

    def prior(self) -> Tensor:
        """The float weight for those products, `[G, O, I]`, float64."""
        rows = self.original.weight.double().flatten(1)
        return rows.view(self.groups, -1, rows.shape[1])

    def start_bias(self, weight: Tensor) -> Tensor:
        """The bias of the layer as it came, with what a shift of its inputs takes off, `[G, O]`."""
        bias = self.original.bias
        zero = weight.new_zeros(weight.shape[:2])
        return zero if bias is None else bias.to(weight).view_as(zero)

    def stride(self, gathered: Gathered) -> int:
        """Of how many tokens one is looked at."""
        return 1

    @torch.no_grad()
    def fit(self, name: str, gathered: Gathered, outputs: list[Tensor]) -> LayerFit | str:
        """Fit weight, bias and what is around them, from the passes that wait at the layer.

        Args:
            name: of the layer.
            gathered: its inputs, in the binarized and in the float model.
            outputs: what the float layer gives, for each pair.

        Returns:
            What became of it; or why it was left as it came.

        Raises:
            ConfigError: if the activations are NaN or infinite.
        """
        self.fit_inputs(gathered)
        if self.module.pair.levels != (-1.0, 1.0):
            return f"its pair has the levels {list(self.module.pair.levels or ())}, not -1 and +1"
        step = self.stride(gathered)

        def wanted(k: int) -> Tensor:
            return self.outputs(outputs[k], gathered.pairs[k].binarized)[::step]

        found = moments(gathered, lambda k: self.inputs(gathered.pairs[k].binarized)[::step], wanted, self.takes_means)
        known = found.joined(self.known)
        self.calls -= 1
        self.known = known if self.calls > 0 else None
        if not bool(torch.isfinite(known.covariance).all() & torch.isfinite(known.cross).all()):
            raise ConfigError(f"{name} was given NaN or infinite activations.")
        start = self.hard()
        if (reason := _constant(known)) is not None:
            self.fit_bias(known, start)
            return reason
        if self.before is None:
            self.before = known.error(start, self.start_bias(start) if self.takes_means else None)
        self.solve(known, gathered.workers)
        weight = self.hard()
        self.fit_bias(known, weight)
        self.fit_behind(gathered, wanted, step)
        return LayerFit(name, known.tokens, weight.shape[2], self.before, known.error(weight, None))

    def fit_bias(self, known: Moments, weight: Tensor) -> None:
        """Let the bias make up for the means."""
        bias = self.module._parameters["bias"]
        if bias is not None:
            means = known.output_mean - (weight @ known.input_mean[:, :, None])[:, :, 0]
            bias.copy_(means.view_as(bias))

    def hard(self) -> Tensor:
        """The weight of one bit, `[G, O, I]`, float64."""
        rows = self.module.effective_weight(hard=True).double().flatten(1)
        return rows.view(self.groups, -1, rows.shape[1])

    def solve(self, known: Moments, workers: int) -> None:
        """Align, round, and set the latents."""
        rounding, prior, rows = rounding_of(self.module), self.prior(), []
        _, scale, _ = self.module.hard_rows()

        def rounded(part: Tensor, start: Tensor, covariance: Tensor) -> Tensor:
            return latents(compensate(part, covariance, rounding, start), self.module)

        scales = scale.double().view(self.groups, -1)
        for group in range(self.groups):
            covariance = known.covariance[group]
            ridge = self.ridge * float(covariance.diagonal().mean())
            wanted = align(known.cross[group], prior[group], covariance, ridge)
            size = len(wanted) if rounding.scale == "tensor" else ROWS
            with ThreadPoolExecutor(workers) as pool:
                one = partial(rounded, covariance=covariance)
                rows += list(pool.map(one, wanted.split(size), scales[group].split(size)))
        self.module.weight.copy_(torch.cat(rows).view_as(self.module.weight))

    @abstractmethod
    def fit_behind(self, gathered: Gathered, wanted: Callable[[int], Tensor], step: int) -> None:
        """Set what comes behind the product."""


def _constant(known: Moments) -> str | None:
    """What there is to say of a layer whose inputs or outputs do not vary: its bias alone can be fitted."""
    for what, power, mean in (
        ("float output", known.power, known.output_mean),
        ("input", known.covariance.diagonal(dim1=1, dim2=2).sum(dim=1), known.input_mean),
    ):
        if bool((power <= CONSTANT * (power + mean.square().sum(dim=1))).any()):
            return f"its {what} is constant: only its bias was fitted"
    return None


class _Linear(Layer):
    module: BinaryLinear

    def __init__(self, module: BinaryLinear, *args: Any) -> None:
        super().__init__(module, *args)
        if module.activation.binary:
            self.ridge = RIDGE_OF_SIGNS

    def floating(self, input: Tensor) -> Tensor:
        return nn.functional.linear(*self.original.placed(input))

    def fit_inputs(self, gathered: Gathered) -> None:
        activation = self.module.activation
        activation.fit(
            lambda function: gathered.total(lambda pair: function(pair.binarized)), self.module.bias is not None
        )
        activation.calibrated = True

    def inputs(self, input: Tensor) -> Tensor:
        values: Tensor = self.module.activation(input, True)
        return values.flatten(0, -2)[:, None]

    def outputs(self, output: Tensor, input: Tensor) -> Tensor:
        rows = output - input if self.module.epilogue.residual else output
        return rows.flatten(0, -2)[:, None]

    def prior(self) -> Tensor:
        weight = super().prior()
        return weight - torch.eye(weight.shape[2]).to(weight) if self.module.epilogue.residual else weight

    def start_bias(self, weight: Tensor) -> Tensor:
        bias, shift = super().start_bias(weight), self.module.activation.shift
        return bias if shift is None else bias + weight @ shift.to(weight)

    def fit_behind(self, gathered: Gathered, wanted: Callable[[int], Tensor], step: int) -> None:
        """An RPReLU without a corner: slope and lift in least squares, z negative and 1 as its two inputs."""
        prelu = self.module.rprelu
        if prelu is None:
            return
        weight, bias = self.module.effective_weight(hard=True), self.module.bias

        def sums(k: int) -> list[Tensor]:
            inputs = self.inputs(gathered.pairs[k].binarized)[::step, 0]
            z = nn.functional.linear(inputs, weight.to(inputs.dtype), bias).double()
            u, rest = z.clamp(max=0), wanted(k)[:, 0].double() - z.clamp(min=0)
            return [u.sum(0), (u * u).sum(0), (u * rest).sum(0), rest.sum(0), z.new_tensor(len(z))]

        su, suu, sur, sr, n = gathered.total(sums, range(len(gathered.pairs)))
        variance = suu / n - (su / n).square()
        slope = torch.where(variance > 0, (sur / n - su * sr / n**2) / variance, 1)
        prelu.corner.zero_()
        prelu.slope.copy_(slope)
        prelu.lift.copy_((sr - slope * su) / n)


class _Conv(Layer):
    module: BinaryConv2d

    def __init__(self, module: BinaryConv2d, *args: Any) -> None:
        super().__init__(module, *args)
        self.groups = module.groups

    def fit_inputs(self, gathered: Gathered) -> None:
        """Nothing: a convolution multiplies floats."""

    def fit_behind(self, gathered: Gathered, wanted: Callable[[int], Tensor], step: int) -> None:
        """Nothing: its output is the product."""

    def floating(self, input: Tensor) -> Tensor:
        result: Tensor = self.module._conv_forward(*self.original.placed(input))
        return result

    def stride(self, gathered: Gathered) -> int:
        conv = self.module

        def positions(k: int) -> list[Tensor]:
            shape = gathered.pairs[k].binarized.shape
            return [torch.tensor(float(shape[0] * shape[-1] * shape[-2] / (conv.stride[0] * conv.stride[1])))]

        (count,) = gathered.total(positions, range(len(gathered.pairs)))
        return max(1, int(count) // (POSITIONS * conv.weight[0].numel()))

    def inputs(self, input: Tensor) -> Tensor:
        conv = self.module
        if conv.padding_mode != "zeros":
            mode = conv.padding_mode
            padded, padding = nn.functional.pad(input, conv._reversed_padding_repeated_twice, mode), (0, 0)
        else:
            around = conv._reversed_padding_repeated_twice
            padded, padding = nn.functional.pad(input, around), (0, 0)
        patches = nn.functional.unfold(padded, conv.kernel_size, conv.dilation, padding, conv.stride)
        batch, _, length = patches.shape
        return patches.view(batch, self.groups, -1, length).permute(0, 3, 1, 2).flatten(0, 1)

    def outputs(self, output: Tensor, input: Tensor) -> Tensor:
        batch = len(output)
        return output.flatten(2).view(batch, self.groups, -1, output[0, 0].numel()).permute(0, 3, 1, 2).flatten(0, 1)


_KINDS: dict[type[LatentWeight], type[Layer]] = {BinaryLinear: _Linear, BinaryConv2d: _Conv}


def layer_of(module: LatentWeight, original: Float, takes_means: bool, calls: int = 1) -> Layer:
    """The layer, as rows and columns."""
    kind = next(kind for cls, kind in _KINDS.items() if isinstance(module, cls))
    return kind(module, original, takes_means, calls)


@torch.no_grad()
def fit_norm(norm: nn.modules.batchnorm._BatchNorm, gathered: Gathered) -> None:
    """Take the statistics of a batch norm anew, so that it gives each channel the mean and variance of the float model.

    Formula:
        g^2 = Var(u_f) / Var(u_x),  (u_x - m') / sqrt(v' + eps) = (g (u_x - E u_x) + E u_f - m) / sqrt(v + eps)
    """
    if all(torch.equal(*pair) for pair in gathered.pairs):
        return

    def sums(pair: tuple[Tensor, Tensor]) -> list[Tensor]:
        rows = [each.transpose(0, 1).flatten(1).double() for each in pair]
        found = [number for row in rows for number in (row.sum(1), row.square().sum(1))]
        return [*found, rows[0].new_tensor(rows[0].shape[1])]

    sum_x, square_x, sum_f, square_f, count = gathered.total(sums)
    mean_x, mean_f = sum_x / count, sum_f / count
    var_x, var_f = square_x / count - mean_x.square(), square_f / count - mean_f.square()
    gain = torch.where((var_x > 0) & (var_f > 0), var_f / var_x.clamp(min=1e-30), 1).sqrt()
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    norm.running_mean.copy_(mean_x - (mean_f - mean) / gain)
    norm.running_var.copy_(((variance + norm.eps) / gain.square() - norm.eps).clamp(min=0))
