"""Selecting the modules of a model, and changing them between the three states. Works on any `nn.Module`."""

from proxbit.patching.equalize import equalize_layers
from proxbit.patching.fuse import FusedActivation, FusedLayerNorm, fuse_layers, unfuse_layers
from proxbit.patching.parts import config_of, is_binarized, origin_of
from proxbit.patching.pictures import PICTURE_ERRORS, blank_picture
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
from proxbit.patching.targets import matches, select, state_of

__all__ = [
    "PICTURE_ERRORS",
    "BinarizationReport",
    "FusedActivation",
    "FusedLayerNorm",
    "ModuleDecision",
    "beyond_float",
    "blank_picture",
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
