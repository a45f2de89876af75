"""Which layers write into a residual stream, and where that stream can be seen: from one watched forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from proxbit.patching.trace import Call, Trace, Use

__all__ = ["Shortcut", "shortcuts"]

ADD, MULTIPLY = torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor
# Between a layer and the addition: a layer scale, and a second one.
STEPS = 3
# A layer scale below does not reach the stream.
FAINT = 1e-3


@dataclass(frozen=True)
class Shortcut:
    """What a layer's output is added to: h + gain y.

    Attributes:
        module: the name of the module that reads h, called once before the layer.
        gain: of the layer, one number or one a channel.
    """

    module: str
    gain: Tensor

    def wanted(self, output: Tensor, missing: Tensor, share: float) -> Tensor:
        """The output that also makes up for a share of what the stream lacks.

        Args:
            output: y of the float layer.
            missing: what the stream of the float model is ahead of that of the binarized one, same shape.
            share: in [0, 1].
        """
        reaches = self.gain.abs() > FAINT
        return output + torch.where(reaches, share / torch.where(reaches, self.gain, 1), 0) * missing


def shortcuts(seen: Trace, layers: Mapping[str, nn.Module]) -> dict[str, Shortcut]:
    """The shortcuts around the layers that have one, by the name of the layer.

    Args:
        seen: one forward pass.
        layers: that may have one; those that are called once, and whose output goes nowhere but into the addition,
            scaled by constants at most.
    """
    names = {id(layer): name for name, layer in layers.items()}
    readers: dict[int, Call] = {}
    found = {}
    for call in seen.calls:
        if id(call.module) in names and seen.times[id(call.module)] == 1:
            sum_of = _addition(seen, call)
            reader = None if sum_of is None else readers.get(id(sum_of[0]))
            if sum_of is not None and reader is not None:
                found[names[id(call.module)]] = Shortcut(reader.name, sum_of[1])
        if seen.times[id(call.module)] == 1:
            readers.setdefault(id(call.input), call)
    return found


def _addition(seen: Trace, call: Call) -> tuple[Tensor, Tensor] | None:
    """What the output of a layer is added to, and its gain there."""
    tensor, gain = call.output, call.output.new_ones(())
    for _ in range(STEPS):
        uses = seen.uses_of(tensor)
        if len(uses) != 1 or len(uses[0].tensors) > 2:
            return None
        use = uses[0]
        other = _other(use, tensor)
        if use.function is ADD and other is not None and other.shape == tensor.shape and not use.options:
            return other, gain
        if use.function is not MULTIPLY or other is None or other.shape != tensor.shape[-1:] or use.result is None:
            return None
        gain, tensor = gain * other, use.result
    return None


def _other(use: Use, tensor: Tensor) -> Tensor | None:
    others = [each for each in use.tensors if each is not tensor]
    return others[0] if len(others) == 1 else None
