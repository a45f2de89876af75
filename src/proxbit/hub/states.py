"""`binarize`, `pack`, `dequantize`: the three states of a model, for transformers models and plain modules alike."""

from typing import TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from proxbit.config import BinarizationConfig
from proxbit.errors import ModelStateError, ProxbitError
from proxbit.hub.hf_quantizer import attach, detach
from proxbit.patching import blank_picture, fuse_layers, to_float, to_latent, to_packed

__all__ = ["binarize", "dequantize", "fuse", "pack"]

Model = TypeVar("Model", bound=nn.Module)


def binarize(model: Model, config: BinarizationConfig | None = None) -> Model:
    """Make a float model latent: its layers keep their weights, and compute with F_mu of them.

    Args:
        model: a transformers model or any module; changed in place.
        config: what to binarize and how; the default is `BinarizationConfig()`.

    Returns:
        The same model, with a `binarization_report`. It is simulated: one bit a weight comes with `pack`.

    Raises:
        ModelStateError: if the model is latent or packed already.
        PatternError: for patterns that match nothing, tied weights, or an empty selection.
        LatentError: for NaN or infinite weights, or rows that are all zero. The model is unchanged after an error.
    """
    _, resolved = to_latent(model, (config or BinarizationConfig()).replace(state="latent"))
    if isinstance(model, PreTrainedModel):
        attach(model, resolved)
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
    if isinstance(model, PreTrainedModel):
        attach(model, model.config.quantization_config.replace(state="packed"))
    return model


def fuse(model: Model, inputs: dict[str, Tensor] | None = None) -> Model:
    """Make a packed model faster: its layers compute the layer normalization before them and the GELU behind them, and
    queries, keys and values of an attention read their input once.

    Results change by the rounding of fp32, which may tip an activation from one int8 level, or one sign, to the next.

    Args:
        model: a packed model; changed in place. It is saved, loaded and dequantized as before; a reloaded model is
            fused again by another call.
        inputs: keyword arguments of one forward pass, from which it is seen what follows what; a blank picture if None.

    Returns:
        The same model.

    Raises:
        ModelStateError: if the model is not packed, or does not take a blank picture.
    """
    if inputs is not None:
        fuse_layers(model, inputs)
        return model
    try:
        fuse_layers(model, blank_picture(model))
    except ProxbitError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ModelStateError(
            f"{type(model).__name__} takes no picture alone ({error}): say what it takes, fuse(model, inputs={{...}})."
        ) from error
    return model


def dequantize(model: Model) -> Model:
    """Make a latent or packed model float: plain layers that hold plus and minus the row scale.

    Args:
        model: a latent or packed model; changed in place.

    Returns:
        The same model, with a `binarization_report`. It needs no plug-in to be saved and loaded.

    Raises:
        ModelStateError: if the model is float already.
    """
    to_float(model)
    if isinstance(model, PreTrainedModel):
        detach(model)
    return model
