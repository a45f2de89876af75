"""Fitting the weights of a whole model: layer after layer, in the order in which it computes."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from proxbit.errors import ConfigError
from proxbit.nn import BinaryProbabilities, LatentWeight, Learned, evaluating, latent_layers
from proxbit.nn.attention import float_attention
from proxbit.patching.trace import Trace, trace
from proxbit.posttraining.fit import Float, Layer, fit_norm, layer_of
from proxbit.posttraining.lockstep import Meeting, Pass, current_pass, lockstep, one_thread, summed
from proxbit.posttraining.moments import Gathered, Pair
from proxbit.posttraining.report import CalibrationReport, LayerFit
from proxbit.posttraining.shortcuts import shortcuts

__all__ = ["Told", "fit_weights"]

Inputs = Mapping[str, Any]
# Told of the name of each module when it has been fitted, and of its share of the work, of 1 in all.
Told = Callable[[str, float], None]
BINARIZED, FLOATING = 0, 1
# Of what a residual stream lacks: the share that the layers which write into it are fitted to make up for.
FEEDBACK = 1.0


def fit_weights(
    model: nn.Module,
    chunks: Sequence[Inputs],
    *,
    images: int,
    told: Told = lambda name, share: None,
    reduce: Callable[[list[Tensor]], list[Tensor]] = lambda tensors: tensors,
) -> CalibrationReport:
    """Fit latents, biases and quantizers of a latent model to what its float weights compute on some images.

    The float model is the latent model with its weights as they are. Two streams go through it side by side: one
    through what is binarized already, one through floats; see `docs/posttraining.md`.

    Args:
        model: latent; changed in place, or after an error not at all.
        chunks: keyword arguments of forward passes; each is held at every layer at the same time.
        images: how many there are in all, for the report.
        told: told how far it is.
        reduce: sums tensors over processes.

    Returns:
        What became of each layer; it is left on the model too.

    Raises:
        ConfigError: if a latent layer is not reached, or given what is no number.
    """
    start = time.perf_counter()
    modules = _fitted_modules(model)
    seen = trace(model, _one(chunks[0]))
    unreached = [name for name, layer in latent_layers(model) if not seen.times[id(layer)]]
    if unreached:
        raise ConfigError(
            f"{unreached[0]} was not called with these images{_more(unreached)}: nothing is known about its inputs. "
            f"Leave it out with modules_to_not_convert=[{unreached[0]!r}], or give what it is for."
        )
    before = {name: _Saved.of(module) for name, module in modules.items()}
    walk = _Walk(model, modules, before, seen, reduce)
    del seen
    try:
        with one_thread() as workers, evaluating(model):
            walk.go(chunks, workers, told)
    except BaseException:
        for name, module in modules.items():
            before[name].restore(module)
        raise
    report = CalibrationReport(images, tuple(walk.fits.values()), walk.left, time.perf_counter() - start)
    report.attach(model)
    return report


def _more(names: Sequence[str]) -> str:
    return f", nor {len(names) - 1} others" if len(names) > 1 else ""


def _fitted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Where there is something to fit."""
    kinds = (LatentWeight, BinaryProbabilities, _BatchNorm)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {
        name: module
        for name, module in found.items()
        if not isinstance(module, _BatchNorm) or module.running_mean is not None
    }


@dataclass(frozen=True)
class _Saved:
    """A module as it was before."""

    tensors: Mapping[str, Tensor]
    calibrated: Sequence[tuple[Learned, bool]]

    @classmethod
    def of(cls, module: nn.Module) -> "_Saved":
        tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict(keep_vars=True).items()}
        return cls(tensors, [(each, each.calibrated) for each in module.modules() if isinstance(each, Learned)])

    @torch.no_grad()
    def restore(self, module: nn.Module) -> None:
        for name, tensor in module.state_dict(keep_vars=True).items():
            tensor.copy_(self.tensors[name])
        for learned, calibrated in self.calibrated:
            learned.calibrated = calibrated


def _one(inputs: Inputs) -> dict[str, Any]:
    """The first example of a batch."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim]
    batch = {len(value) for value in tensors}
    if len(batch) != 1:
        return dict(inputs)
    return {key: value[:1] if isinstance(value, Tensor) and value.ndim else value for key, value in inputs.items()}


def _normed(seen: Trace) -> set[int]:
    """The identities of layers whose output a batch norm reads, as it is or in another shape."""
    norms = {(call.input.data_ptr(), call.input.numel()) for call in seen.calls if isinstance(call.module, _BatchNorm)}
    return {id(call.module) for call in seen.calls if (call.output.data_ptr(), call.output.numel()) in norms}


class _Walk:
    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        before: Mapping[str, "_Saved"],
        seen: Trace,
        reduce: Callable[[list[Tensor]], list[Tensor]],
    ) -> None:
        self.model, self.modules, self.reduce = model, modules, reduce
        normed = _normed(seen)
        self.layers: dict[str, Layer] = {}
        for name, module in modules.items():
            if isinstance(module, LatentWeight):
                original = Float(before[name].tensors["weight"], before[name].tensors.get("bias"))
                takes_means = original.bias is not None or id(module) in normed
                self.layers[name] = layer_of(module, original, takes_means, seen.times[id(module)])
        self.shortcuts = shortcuts(seen, {name: layer.module for name, layer in self.layers.items()})
        work = {name: _work(module) * seen.times[id(module)] for name, module in modules.items()}
        self.shares = {name: part / max(1, sum(work.values())) for name, part in work.items()}
        self.fits: dict[str, LayerFit] = {}
        self.left: dict[str, str] = {}

    def go(self, chunks: Sequence[Inputs], workers: int, told: Told) -> None:
        """Walk through the model."""
        device = next(self.model.parameters()).device
        passes = [
            Pass(partial(_run, self.model, chunk, stream), (k, stream))
            for k, chunk in enumerate(chunks)
            for stream in (BINARIZED, FLOATING)
        ]
        with ExitStack() as stack:
            for name in {each.module for each in self.shortcuts.values()}:
                stack.callback(self.model.get_submodule(name).register_forward_pre_hook(partial(_keep, name)).remove)
            for meeting in lockstep(self.modules, passes, workers=workers, device=device):
                self._fit(meeting, workers)
                told(meeting.name, self.shares[meeting.name])

    def _fit(self, meeting: Meeting, workers: int) -> None:
        found: dict[int, dict[int, Pass]] = {}
        for each in meeting.passes:
            found.setdefault(each.key[0], {})[each.key[1]] = each
        name, module = meeting.name, meeting.module
        if isinstance(module, BinaryProbabilities):  # The float stream does not come here.
            inputs = [each.input for each in meeting.passes if each.input is not None]
            module.fit(lambda function: self.reduce(summed(function, inputs, workers)))
            module.calibrated = True
            return
        both = [each for each in found.values() if len(each) == 2]
        pairs = [Pair(each[BINARIZED].input, each[FLOATING].input) for each in both]  # type: ignore[arg-type]
        gathered = Gathered(pairs, workers, self.reduce)
        if isinstance(module, _BatchNorm):
            outputs = [_batch_norm(module, pair.floating) for pair in pairs]
            fit_norm(module, gathered)
        else:
            layer = self.layers[name]
            with torch.no_grad():
                outputs = [layer.floating(pair.floating) for pair in pairs]
                wanted = self._wanted(name, outputs, both)
            result = layer.fit(name, gathered, wanted)
            if isinstance(result, str):
                self.left[name] = result
            else:
                self.fits[name] = result
        for streams, output in zip(both, outputs, strict=True):
            streams[FLOATING].output = output

    def _wanted(self, name: str, outputs: list[Tensor], both: list[dict[int, Pass]]) -> list[Tensor]:
        """The outputs of the float layer and, of layers that write into a residual stream, a part of what it lacks."""
        shortcut = self.shortcuts.get(name)
        if shortcut is None:
            return outputs
        streams = [[each[stream].kept.pop(shortcut.module) for stream in (BINARIZED, FLOATING)] for each in both]
        return [
            shortcut.wanted(output, floating - binarized, FEEDBACK)
            for output, (binarized, floating) in zip(outputs, streams, strict=True)
        ]


def _keep(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """As a hook: the pass that calls a module keeps what it gives to it."""
    current = current_pass()
    if current is not None:
        current.kept[name] = arguments[0]


@torch.no_grad()
def _batch_norm(norm: _BatchNorm, input: Tensor) -> Tensor:
    return type(norm).forward(norm, input)


def _run(model: nn.Module, inputs: Inputs, stream: int) -> None:
    with ExitStack() as stack:
        if stream == FLOATING:
            stack.enter_context(float_attention())
        model(**inputs)


def _work(module: nn.Module) -> int:
    """About how much work a module is, for a token."""
    if not isinstance(module, LatentWeight):
        return 0
    rows, columns = module.weight.flatten(1).shape
    return columns * (columns + 2 * rows)
