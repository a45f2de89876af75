"""Input scales that the layer normalization before binarized linear layers takes, so that row scales are enough."""

from collections import Counter

import torch
from torch import Tensor, nn

from proxbit.config import BinarizationConfig
from proxbit.errors import ConfigError, ModelStateError
from proxbit.nn import ACTIVATIONS, BinaryLinear
from proxbit.patching.layer_config import layer_options
from proxbit.patching.selection import select, state_of
from proxbit.patching.trace import norms_before, trace

__all__ = ["equalize_layers"]


def _latent_layers(model: nn.Module) -> dict[nn.Linear, tuple[str, bool]]:
    """Linear layers with latent weights; their activations, and whether there is a residual."""
    layers = (module for module in model.modules() if isinstance(module, BinaryLinear))
    return {layer: (layer.activations, layer.epilogue.residual) for layer in layers}


def _float_layers(model: nn.Module, config: BinarizationConfig) -> dict[nn.Linear, tuple[str, bool]]:
    """The same for linear layers that would be binarized."""
    found, _ = layer_options(model, select(model, config), config)
    layers = ((model.get_submodule(name), options) for name, options in found.items())
    return {
        layer: (options["activations"], options["epilogue"].residual)
        for layer, options in layers
        if isinstance(layer, nn.Linear)
    }


def _error(sizes: Tensor, scale: Tensor) -> Tensor:
    """What row scales leave of the sizes of weights, `[O, I]`, whose columns were divided by `scale`, `[I]`."""
    rows = (sizes / scale).mean(dim=1, keepdim=True)
    return (sizes - rows * scale).square().sum()


def _input_scale(sizes: Tensor) -> Tensor:
    """The scale b of every input, `[I]`, from the sizes of the weights that read them, `[O, I]`; see `equalize`."""
    # In units of the mean size, so that no square underflows.
    scale = (sizes.mean(dim=1) / sizes.mean()) @ sizes
    alive = scale > 0
    return torch.where(alive, scale / scale[alive].log().mean().exp(), 1)


@torch.no_grad()
def _fold(norm: nn.LayerNorm, layers: list[nn.Linear]) -> None:
    """Move input scales from the layers to the normalization, if that brings their row-scaled signs nearer."""
    weights = [layer.weight for layer in layers]
    sizes = torch.cat([weight.abs().to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights])
    scale = _input_scale(sizes)
    if not bool(_error(sizes, scale) < _error(sizes, torch.ones_like(scale))):
        return
    for factor in (norm.weight, norm.bias):
        factor.mul_(scale)
    for weight in weights:
        weight.div_(scale)


def equalize_layers(model: nn.Module, inputs: dict[str, Tensor], config: BinarizationConfig | None = None) -> None:
    """Let layer normalizations take the input scales of the binarized linear layers behind them, see `hub.equalize`.

    Args:
        model: a float or latent model; changed in place.
        inputs: keyword arguments of one forward pass, from which it is seen what reads what.
        config: for a float model, what will be binarized and how; the default is `BinarizationConfig()`.

    Raises:
        ModelStateError: if the model is packed.
        ConfigError: if the model is latent, which says itself what is binarized, and there is a configuration.
        PatternError: for a float model, see `selection.select`.
    """
    state = state_of(model)
    if state == "packed":
        raise ModelStateError("equalize takes a float or latent model, this one is packed: call it before pack.")
    if state == "latent" and config is not None:
        raise ConfigError("A latent model has its configuration already: call equalize without one.")
    found = _latent_layers(model) if state == "latent" else _float_layers(model, config or BinarizationConfig())
    # A sign forgets the size of its input; a residual would bring the scale to the output.
    layers = [layer for layer, (kind, residual) in found.items() if not ACTIVATIONS[kind].binary and not residual]
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, readers in norms_before(trace(model, inputs), layers).items():
        norm = model.get_submodule(name)
        assert isinstance(norm, nn.LayerNorm)
        if all(owners[id(each)] == 1 for each in (norm.weight, norm.bias, *(layer.weight for layer in readers))):
            _fold(norm, readers)
