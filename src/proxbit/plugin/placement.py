"""Where the weights of a model may lie, and which of them may be split."""

from typing import Any

from torch import nn

from proxbit.errors import ConfigError
from proxbit.nn import latent_layers
from proxbit.patching import packed_layers

__all__ = ["check_not_split", "check_trainable_places"]


def check_trainable_places(device_map: Any) -> None:
    """Check that a latent model will have all of its weights at hand.

    Args:
        device_map: as `from_pretrained` takes it, or `model.hf_device_map`.

    Raises:
        ConfigError: if a part of the model is to lie on disk, or nowhere.
    """
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    for place in map(str, places):
        if place in ("disk", "meta"):
            raise ConfigError(
                f"device_map puts weights on {place!r}: latent weights are trained, so they cannot lie there. Leave "
                "out device_map; a packed model may lie on disk."
            )


def check_not_split(model: nn.Module) -> None:
    """Check that a plan for tensor parallelism has left latent and packed layers alone.

    transformers (5.15 to 5.23 at least) splits parameters only, and not packed weights, which are buffers; and without
    gradients it gives a latent layer columns as if they were all there are, so that mean and scale are those of half a
    row.

    Args:
        model: as loaded.

    Raises:
        ConfigError: naming the layers.
    """
    layers = [*latent_layers(model), *packed_layers(model)]
    split = [name for name, layer in layers if getattr(layer, "_is_hooked", False)]
    if split:
        more = f" and {len(split) - 1} more" if len(split) > 1 else ""
        raise ConfigError(
            f"The tp_plan splits {split[0]}{more}: latent and packed layers cannot be split by it. Plan float layers "
            "only, or load with device_map."
        )
