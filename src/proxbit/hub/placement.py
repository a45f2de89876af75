"""Where the weights of a model may lie."""

from typing import Any

from proxbit.errors import ConfigError

__all__ = ["check_trainable_places"]


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
