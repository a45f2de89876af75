"""The table of supported families: what the defaults make 1-bit in each, what they leave and why, and what it is fed.

The patterns are written down from the architectures, not taken from the package. `docs/families.py` prints them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiny_models import LABELS, SIDE

PATCHES, HEAD, STEM, POSITIONS = "patch embedding", "head", "stem", "relative positions"
DEPTHWISE, POOLER, TEXT, DEFORMABLE = "depthwise", "pooler", "text side", "deformable attention"
OWN, FROZEN = "nn.MultiheadAttention", "frozen by transformers"

Batch = dict[str, Any]


def pixels(pictures: Tensor) -> Batch:
    """What most models take."""
    return {"pixel_values": pictures}


def patches(pictures: Tensor) -> Batch:
    """What SigLIP2 takes: patches of 8 x 8 in rows, and how many there are each way."""
    rows = torch.nn.functional.unfold(pictures, 8, stride=8).transpose(1, 2)
    shapes = torch.tensor([[pictures.shape[-1] // 8] * 2] * len(pictures))
    mask = torch.ones(rows.shape[:2], dtype=torch.long)
    return {"pixel_values": rows, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def pairs(pictures: Tensor) -> Batch:
    """Pictures and texts; the last token of a text is its end."""
    tokens = torch.arange(3, 3 + 5 * len(pictures)).view(len(pictures), 5)
    tokens[:, -1] = 2
    return {"input_ids": tokens, "pixel_values": pictures}


def classes(count: int) -> Batch:
    """A label a picture."""
    return {"labels": torch.arange(count) % LABELS}


def boxes(count: int) -> Batch:
    """One object a picture."""
    return {
        "labels": [
            {"class_labels": torch.tensor([i % LABELS]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.2 + 0.1 * i]])}
            for i in range(count)
        ]
    }


def areas(count: int) -> Batch:
    """A label a pixel: stripes."""
    return {"labels": (torch.arange(SIDE) // 4 % LABELS).expand(count, SIDE, SIDE).contiguous()}


def masks(count: int) -> Batch:
    """Two masks a picture: its halves."""
    left = (torch.arange(SIDE) < SIDE // 2).expand(SIDE, SIDE)
    return {
        "mask_labels": [torch.stack([left, ~left]).float()] * count,
        "class_labels": [torch.tensor([i % LABELS, 2]) for i in range(count)],
    }


def contrast(count: int) -> Batch:
    """Each picture belongs to its text."""
    return {"return_loss": True}


def nothing(count: int) -> Batch:
    """Features and depths have no loss in transformers: see `square`."""
    return {}


def square(outputs: Any) -> Tensor:
    """A loss for those."""
    return outputs[0].square().mean()


@dataclass(frozen=True)
class Family:
    """A row of the table. Patterns are those of `fnmatch`, on names of modules.

    Args:
        title: as the table shows it.
        binarized: what the defaults make 1-bit.
        left: what the defaults leave alone, and why.
        side: of the pictures, in pixels.
        inputs: from pictures, the keyword arguments of a forward pass.
        labels: from a number of pictures, those that are added for a loss.
        loss: of the outputs, where the model has none.
        still: what is 1-bit and gets no gradient, in the first layer of decoders that start from zeros.
    """

    title: str
    binarized: tuple[str, ...]
    left: dict[str, str]
    side: int = SIDE
    inputs: Callable[[Tensor], Batch] = pixels
    labels: Callable[[int], Batch] = classes
    loss: Callable[[Any], Tensor] | None = None
    still: tuple[str, ...] = ()


PROJECTIONS = ("*.attention.?_proj", "*.mlp.fc?")
SPLIT = ("*.attention.query", "*.attention.key", "*.attention.value", "*.dense")
DECODER = ("*.layers.*.self_attn.?_proj", "*.layers.*.encoder_attn.?_proj", "*.layers.*.mlp.fc?")
WINDOWS = ("*.blocks.*.attention.?_proj", "*.blocks.*.mlp.fc?", "*.downsample.reduction")
PATCH = {"*.patch_embeddings.projection": PATCHES}
CLASSIFIER = {"classifier": HEAD}
FIRST_VALUES = ("*.decoder.layers.0.self_attn.v_proj",)
BOXES = {"class_labels_classifier*": HEAD, "bbox_predictor.*": HEAD}
TOWER = ("vision_model.encoder.layers.*.self_attn.*_proj", "vision_model.encoder.layers.*.mlp.fc?")
TOWER_PATCH = {"vision_model.embeddings.patch_embedding": PATCHES}
NEXT = ("*.pwconv?", "*.downsampling_layer.1")
NEXT_LEFT = {"*.embeddings.patch_embeddings": PATCHES, "*.dwconv": DEPTHWISE, "classifier": HEAD}

TABLE: dict[str, Family] = {
    "vit": Family("ViT", PROJECTIONS, PATCH | CLASSIFIER),
    "deit": Family("DeiT", PROJECTIONS, PATCH | CLASSIFIER),
    "beit": Family("BEiT", PROJECTIONS, PATCH | CLASSIFIER),
    "swin": Family("Swin", WINDOWS, PATCH | CLASSIFIER),
    "swinv2": Family(
        "Swin V2",
        ("*.self.query", "*.self.key", "*.self.value", "*.dense", "*.downsample.reduction"),
        PATCH | {"*.continuous_position_bias_mlp.?": POSITIONS} | CLASSIFIER,
    ),
    "dinov2": Family("DINOv2", PROJECTIONS, PATCH | CLASSIFIER),
    "dinov2 with registers": Family("DINOv2, with registers", PROJECTIONS, PATCH | CLASSIFIER),
    "dinov3": Family(
        "DINOv3",
        ("*.attention.?_proj", "*.mlp.up_proj", "*.mlp.down_proj"),
        {"embeddings.patch_embeddings": PATCHES},
        labels=nothing,
        loss=square,
    ),
    "dinov3 convnext": Family(
        "DINOv3, ConvNeXt",
        ("*.pointwise_conv?", "*.stages.[1-9].downsample_layers.1"),
        {"*.stages.0.downsample_layers.0": PATCHES, "*.depthwise_conv": DEPTHWISE},
        labels=nothing,
        loss=square,
    ),
    "clip": Family("CLIP, picture side", TOWER, TOWER_PATCH | CLASSIFIER),
    "clip with text": Family(
        "CLIP, both sides",
        TOWER,
        TOWER_PATCH | {"text_model.*": TEXT, "text_projection": HEAD, "visual_projection": HEAD},
        inputs=pairs,
        labels=contrast,
    ),
    "siglip": Family("SigLIP", TOWER, TOWER_PATCH | {"vision_model.head.*": POOLER} | CLASSIFIER),
    "siglip2": Family("SigLIP2", TOWER, TOWER_PATCH | {"vision_model.head.*": POOLER} | CLASSIFIER, inputs=patches),
    "mobilevit": Family(
        "MobileViT",
        (
            *SPLIT,
            "*.expand_1x1.*",
            "*.reduce_1x1.*",
            "*.conv_kxk.*",
            "*.conv_1x1*",
            "*.conv_projection.*",
            "*.fusion.*",
        ),
        {"*.conv_stem.*": STEM, "*.conv_3x3.*": DEPTHWISE} | CLASSIFIER,
        side=4 * SIDE,
    ),
    "mobilevitv2": Family(
        "MobileViTV2",
        ("*.*_proj.*", "*.ffn.conv?.*", "*.expand_1x1.*", "*.reduce_1x1.*", "*.conv_1x1.*", "*.conv_projection.*"),
        {"*.conv_stem.*": STEM, "*.conv_3x3.*": DEPTHWISE, "*.conv_kxk.*": DEPTHWISE} | CLASSIFIER,
        side=2 * SIDE,
    ),
    "pvtv2": Family(
        "PVTv2",
        (*SPLIT[:3], "*.attention.proj", "*.spatial_reduction", "*.mlp.dense?", "*.layers.1.patch_embedding.proj"),
        {"*.layers.0.patch_embedding.proj": PATCHES, "*.dwconv.dwconv": DEPTHWISE} | CLASSIFIER,
    ),
    "cvt": Family(
        "CvT",
        ("*.attention.projection_*", "*.dense", "*.stages.1.embedding.*"),
        {"*.stages.0.embedding.*": PATCHES, "*.convolution_projection_*": DEPTHWISE} | CLASSIFIER,
    ),
    "levit": Family(
        "LeViT",
        ("levit.encoder.*.linear",),
        {"levit.patch_embeddings.*": PATCHES, "classifier.linear": HEAD},
        side=2 * SIDE,
    ),
    "hiera": Family(
        "Hiera", ("*.attn.qkv", "*.attn.proj", "*.mlp.fc?", "*.stages.1.layers.0.proj"), PATCH | CLASSIFIER
    ),
    "convnext": Family("ConvNeXt", NEXT, NEXT_LEFT),
    "convnextv2": Family("ConvNeXt V2", NEXT, NEXT_LEFT),
    "resnet": Family("ResNet", ("resnet.encoder.*",), {"resnet.embedder.*": STEM, "classifier.1": HEAD}),
    "detr": Family(
        "DETR, ResNet backbone",
        ("model.input_projection", *DECODER),
        {"model.backbone.model.embedder.*": STEM, "model.backbone.model.encoder.*": FROZEN} | BOXES,
        labels=boxes,
        still=FIRST_VALUES,
    ),
    "yolos": Family("YOLOS", SPLIT, PATCH | BOXES, labels=boxes),
    "segformer": Family(
        "SegFormer",
        (*PROJECTIONS, "*.sequence_reduction.sequence_reduction", "*.stages.1.patch_embeddings.proj"),
        {"*.stages.0.patch_embeddings.proj": PATCHES, "*.dwconv.dwconv": DEPTHWISE, "decode_head.*": HEAD},
        labels=areas,
    ),
    "upernet": Family(
        "UperNet, Swin backbone", WINDOWS, PATCH | {"decode_head.*": HEAD, "auxiliary_head.*": HEAD}, labels=areas
    ),
    "maskformer": Family(
        "MaskFormer, Swin backbone",
        (
            *("*.attention.self.query", "*.attention.self.key", "*.attention.self.value", "*.dense"),
            *("*.downsample.reduction", "*.fpn.layers.*", "*.input_projection", *DECODER),
        ),
        PATCH | {"*.fpn.stem.0": STEM, "*.mask_projection": HEAD, "class_predictor": HEAD, "mask_embedder.*": HEAD},
        labels=masks,
        still=FIRST_VALUES,
    ),
    "mask2former": Family(
        "Mask2Former, Swin backbone",
        (
            *(*WINDOWS, "*.self_attn.?_proj", "*.self_attn.out_proj", "*.self_attn.value_proj", "*.output_proj"),
            *("*.decoder.*.fc?", "*.input_projections.*", "*.adapter_1.0", "*.layer_1.0"),
        ),
        PATCH
        | {"*.sampling_offsets": DEFORMABLE, "*.attention_weights": DEFORMABLE, "*.cross_attn.out_proj": OWN}
        | {"*.mask_projection": HEAD, "*.mask_predictor.*": HEAD, "class_predictor": HEAD},
        labels=masks,
    ),
    "dpt depth": Family("DPT, depth", SPLIT, PATCH | {"neck.*": HEAD, "head.*": HEAD}, labels=nothing, loss=square),
    "dpt segmentation": Family(
        "DPT, segmentation", SPLIT, PATCH | {"neck.*": HEAD, "head.*": HEAD, "auxiliary_head.*": HEAD}, labels=areas
    ),
}
