"""A picture for a vision model that needs to run once, to be looked at."""

import torch
from torch import Tensor, nn

__all__ = ["blank_picture"]


# What a model raises that does not take a picture alone, or not such a one.
PICTURE_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)


def blank_picture(model: nn.Module) -> dict[str, Tensor]:
    """One black picture of the size, dtype and device that the model takes, as keyword arguments of its forward."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    of_timm = getattr(config, "pretrained_cfg", None) or {}
    side = getattr(config, "image_size", of_timm.get("input_size", 224))
    height, width = (side, side) if isinstance(side, int) else tuple(side)[-2:]
    floats = (p for p in model.parameters() if p.is_floating_point())
    like = next(floats, torch.empty(0))
    shape = (1, getattr(config, "num_channels", 3), height, width)
    return {"pixel_values": torch.zeros(shape, dtype=like.dtype, device=like.device)}
