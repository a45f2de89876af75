"""What a `tp_plan` of transformers may not split."""

from torch import nn

from proxbit.errors import ConfigError
from proxbit.nn import latent_layers
from proxbit.patching import packed_layers

__all__ = ["check_not_split"]


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
