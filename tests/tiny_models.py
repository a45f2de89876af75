"""Tiny models of the families that proxbit is tested with, from configurations with random weights: no download."""

from collections.abc import Callable

import transformers as hf
from torch import nn

SIDE = 32
LABELS = 3


def _transformer_sizes() -> dict:
    """36 and 50 are no multiples of 8: padding bits are always in play."""
    return dict(
        image_size=SIDE,
        patch_size=8,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=50,
        num_labels=LABELS,
    )


def vit(**changes) -> hf.ViTConfig:
    return hf.ViTConfig(**(_transformer_sizes() | changes))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: hf.ViTForImageClassification(vit()),
    "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**_transformer_sizes())),
    "beit": lambda: hf.BeitForImageClassification(hf.BeitConfig(**_transformer_sizes())),
    "swin": lambda: hf.SwinForImageClassification(
        hf.SwinConfig(
            image_size=SIDE,
            patch_size=4,
            embed_dim=12,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
            num_labels=LABELS,
        )
    ),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**_transformer_sizes())),
    "clip": lambda: hf.CLIPForImageClassification(
        hf.CLIPConfig(
            vision_config=_transformer_sizes(),
            text_config=dict(hidden_size=36, num_hidden_layers=1, num_attention_heads=4, intermediate_size=50),
            num_labels=LABELS,
        )
    ),
    "siglip": lambda: hf.SiglipForImageClassification(
        hf.SiglipConfig(
            vision_config=_transformer_sizes(),
            text_config=dict(hidden_size=36, num_hidden_layers=1, num_attention_heads=4, intermediate_size=50),
            num_labels=LABELS,
        )
    ),
    "convnext": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[12, 20], depths=[1, 1], num_stages=2, image_size=SIDE, num_labels=LABELS)
    ),
    "resnet": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=12, hidden_sizes=[12, 20], depths=[1, 1], layer_type="basic", num_labels=LABELS)
    ),
    "mobilevit": lambda: hf.MobileViTForImageClassification(
        hf.MobileViTConfig(
            image_size=SIDE,
            hidden_sizes=[12, 12, 12],
            neck_hidden_sizes=[8, 8, 12, 12, 12, 12, 20],
            num_labels=LABELS,
        )
    ),
}
