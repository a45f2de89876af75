"""`binarize`, `pack`, `dequantize`: the three states of a model, for transformers models and plain modules alike; and
what makes the first better and the second faster, `equalize` and `fuse`."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from proxbit.checkpoint.weights import check_storable
from proxbit.config import BinarizationConfig
from proxbit.errors import ConfigError, ModelStateError, ProxbitError
from proxbit.patching import (
    IMAGE_ERRORS,
    beyond_float,
    blank_image,
    equalize_layers,
    fuse_layers,
    state_of,
    to_float,
    to_latent,
    to_packed,
)
from proxbit.plugin.hf_quantizer import update_configs
from proxbit.plugin.model_configs import copy_config

__all__ = ["binarize", "dequantize", "equalize", "fuse", "pack"]

Model = TypeVar("Model", bound=nn.Module)


def _look(
    name: str, model: nn.Module, inputs: dict[str, Tensor] | None, change: Callable[[dict[str, Tensor]], None]
) -> None:
    """Make a change that runs the model once: on `inputs`, or on a blank image."""
    try:
        change(blank_image(model) if inputs is None else inputs)
    except ProxbitError:
        raise
    except IMAGE_ERRORS as error:
        if inputs is not None:
            raise
        hint = f"say what it takes, {name}(model, inputs={{...}})"
        raise ModelStateError(f"{type(model).__name__} takes no image alone ({error}): {hint}.") from error


def _given(config: BinarizationConfig | None) -> BinarizationConfig | None:
    if config is None or isinstance(config, BinarizationConfig):
        return config
    raise ConfigError(
        f"config: {config!r} is no BinarizationConfig. Make one, proxbit.BinarizationConfig(...), or take that of a "
        "recipe, proxbit.get_recipe('w1a8').binarization()."
    )


def equalize(model: Model, inputs: dict[str, Tensor] | None = None, config: BinarizationConfig | None = None) -> Model:
    r"""Make the signs of a model fit better: what the weights of one input have in common goes into the layer
    normalization before them, and what is left suits one scale a row. A start for training or packing.

    Formula:
        |W_ij| ~ a_i b_j,   a_i = mean_j |W_ij|,   b_j = \sum_i a_i |W_ij| / \sum_i a_i^2,   \prod_j b_j = 1
        weight_j <- b_j weight_j,   bias_j <- b_j bias_j   (layer normalization),   W_ij <- W_ij / b_j

    W is all weights that read the normalization, one above the other: queries, keys and values share b. b is the least
    squares column scale for the row scales a, the first step of a power iteration to the leading singular vectors of
    |W|; inputs whose weights are all zero keep b_j = 1. The function of a float model stays, up to rounding; the
    squared error of W, \sum_ij (|W_ij| - a_i b_j)^2 with the new row scale a_i = mean_j |W_ij| / b_j, gets smaller: a
    normalization where it would not is left alone. So is one whose result anything but such layers reads, that is
    called twice, that shares its parameters, or that has no weight or bias; and layers with a residual, or whose
    activations have two levels, for a sign forgets the size of its input.

    Args:
        model: a float or latent model, from `binarize` or `from_pretrained`; changed in place. `calibrate` comes after.
        inputs: keyword arguments of one forward pass, from which it is seen what reads what; a blank image if None.
        config: for a float model, what `binarize` will be called with; the default is `BinarizationConfig()`.

    Returns:
        The same model.

    Raises:
        ModelStateError: if the model is packed, or does not take a blank image.
        ConfigError: if the model is latent, which says itself what is binarized, and there is a configuration; or if
            it is something else than a BinarizationConfig.
        PatternError: for a float model, as by `binarize`.

    Source:
        |W| ~ a b^T: Xu et al., OneBit: Towards Extremely Low-bit Large Language Models, NeurIPS 2024, where b is
        multiplied in every forward pass, and learned. Scales that move between layers: Nagel, van Baalen, Blankevoort,
        Welling, Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019.
    """
    _look("equalize", model, inputs, partial(equalize_layers, model, config=_given(config)))
    return model


def binarize(model: Model, config: BinarizationConfig | None = None) -> Model:
    """Make a float model latent: its layers keep their weights, and compute with F_mu of them.

    Args:
        model: a transformers model or any module, also one around transformers models, each of which is told how it
            was binarized; changed in place.
        config: what to binarize and how; the default is `BinarizationConfig()`.

    Returns:
        The same model, with a `binarization_report`. It is simulated: one bit a weight comes with `pack`.

    Raises:
        ConfigError: if the configuration is something else than a BinarizationConfig, or if it takes only some of the
            layers whose weights transformers stores as one, such as the inputs of a SwiGLU in DINOv2.
        ModelStateError: if the model is latent or packed already.
        PatternError: for patterns that match nothing, tied weights, or an empty selection.
        LatentError: for NaN or infinite weights, or rows that are all zero. The model is unchanged after an error.
    """
    given = (_given(config) or BinarizationConfig()).replace(state="latent", calibration=None)
    to_latent(model, given, partial(_check_parts, model))
    for _, part in _outermost(model):
        if state_of(part) != "float":
            copy_config(part)
    update_configs(model)
    return model


def pack(model: Model) -> Model:
    """Make a latent model packed: one bit a weight and one scale a row.

    Args:
        model: a latent model; changed in place.

    Returns:
        The same model, with a `binarization_report`. It cannot be trained any more.

    Raises:
        ModelStateError: if the model is float or packed already.
        ConfigError: if the levels of a pair are not -1 and +1.
        LatentError: for NaN or infinite latents, or rows that are all zero. The model is unchanged after an error.
    """
    to_packed(model)
    update_configs(model)
    return model


def _outermost(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """The transformers models in a model, by name: itself, or those in a module around them."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not name.startswith(inside):
            inside += (f"{name}." if name else "",)
            yield name, module


def _check_parts(model: nn.Module, layers: list[str]) -> None:
    """Check that the transformers models in a float model could be saved once they are packed."""
    for name, part in _outermost(model):
        prefix = f"{name}." if name else ""
        check_storable(part, [layer.removeprefix(prefix) for layer in layers if layer.startswith(prefix)])


def fuse(model: Model, inputs: dict[str, Tensor] | None = None) -> Model:
    """Make a packed model faster: its layers compute the layer normalization before them and the GELU behind them, and
    queries, keys and values of an attention read their input once.

    Results change by the rounding of fp32, which may tip an activation from one int8 level, or one sign, to the next.

    Args:
        model: a packed model; changed in place. It is saved, loaded and dequantized as before; a reloaded model is
            fused again by another call.
        inputs: keyword arguments of one forward pass, from which it is seen what follows what; a blank image if None.

    Returns:
        The same model.

    Raises:
        ModelStateError: if the model is not packed, or does not take a blank image.
    """
    _look("fuse", model, inputs, partial(fuse_layers, model))
    return model


def dequantize(model: Model) -> Model:
    """Make a latent or packed model float: plain layers that hold plus and minus the row scale.

    Outputs stay the same but for the rounding of activations (int8, int4). Activations of two levels and narrow
    accumulators are left out, with a warning: outputs are then those of another model.

    Args:
        model: a latent or packed model; changed in place.

    Returns:
        The same model, with a `binarization_report`. It needs no plug-in to be saved and loaded.

    Raises:
        ModelStateError: if the model is float already, or has an RPReLU.
    """
    left_out = beyond_float(model)
    to_float(model)
    update_configs(model)
    if left_out:
        warnings.warn(f"The float model has other outputs: it is without {', '.join(left_out)}.", stacklevel=2)
    return model
