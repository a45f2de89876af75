"""Selecting the modules of a model, and changing them between the three states. Works on any `nn.Module`."""

from proxbit.deprecation import renamed
from proxbit.patching.equalize import equalize_layers
from proxbit.patching.fuse import FusedActivation, FusedLayerNorm, fuse_layers, unfuse_layers
from proxbit.patching.layer_config import config_of, is_binarized, origin_of
from proxbit.patching.replace import (
    beyond_float,
    check_latents,
    check_packed_layers,
    make_packed,
    packed_layers,
    report_packed,
    to_float,
    to_latent,
    to_packed,
)
from proxbit.patching.report import BinarizationReport, ModuleDecision
from proxbit.patching.selection import matches, select, state_of
from proxbit.patching.trace import IMAGE_ERRORS, blank_image

__all__ = [
    "IMAGE_ERRORS",
    "BinarizationReport",
    "FusedActivation",
    "FusedLayerNorm",
    "ModuleDecision",
    "beyond_float",
    "blank_image",
    "check_latents",
    "check_packed_layers",
    "config_of",
    "equalize_layers",
    "fuse_layers",
    "is_binarized",
    "make_packed",
    "matches",
    "origin_of",
    "packed_layers",
    "report_packed",
    "select",
    "state_of",
    "to_float",
    "to_latent",
    "to_packed",
    "unfuse_layers",
]

__getattr__ = renamed(
    __name__, {"PICTURE_ERRORS": ("IMAGE_ERRORS", IMAGE_ERRORS), "blank_picture": ("blank_image", blank_image)}
)
