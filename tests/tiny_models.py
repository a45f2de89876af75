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


def _text_sizes() -> dict:
    return dict(vocab_size=99, hidden_size=36, num_hidden_layers=1, num_attention_heads=4, intermediate_size=50)


def _tokens() -> dict:
    return dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def _pyramid_sizes() -> dict:
    """Of PVTv2 and SegFormer: two stages, the first with fewer keys than queries."""
    return dict(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[12, 20],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        num_labels=LABELS,
    )


def _convnext_sizes() -> dict:
    return dict(hidden_sizes=[12, 20], depths=[1, 1], num_stages=2, image_size=SIDE, num_labels=LABELS)


def _window_sizes() -> dict:
    """Of Swin and its second version."""
    return dict(
        image_size=SIDE, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=LABELS
    )


def _detr_sizes() -> dict:
    return dict(
        d_model=24,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=28,
        decoder_ffn_dim=28,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=5,
    )


def _swin_backbone() -> hf.SwinConfig:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return hf.SwinConfig(
        image_size=SIDE,
        patch_size=2,
        embed_dim=12,
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 2, 2],
        window_size=2,
        out_features=stages,
    )


def vit(**changes) -> hf.ViTConfig:
    return hf.ViTConfig(**(_transformer_sizes() | changes))


def _detr() -> nn.Module:
    backbone = hf.ResNetConfig(
        embedding_size=12, hidden_sizes=[12, 20], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    return hf.DetrForObjectDetection(hf.DetrConfig(backbone_config=backbone, num_labels=LABELS, **_detr_sizes()))


def _dpt(kind: Callable[[hf.DPTConfig], nn.Module]) -> nn.Module:
    sizes = _transformer_sizes() | dict(num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3])
    return kind(hf.DPTConfig(**sizes, neck_hidden_sizes=[12, 12, 20, 20], fusion_hidden_size=12))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: hf.ViTForImageClassification(vit()),
    "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**_transformer_sizes())),
    "beit": lambda: hf.BeitForImageClassification(
        hf.BeitConfig(**_transformer_sizes(), use_relative_position_bias=True)
    ),
    "swin": lambda: hf.SwinForImageClassification(hf.SwinConfig(**_window_sizes())),
    "swinv2": lambda: hf.Swinv2ForImageClassification(hf.Swinv2Config(**_window_sizes())),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**_transformer_sizes())),
    "dinov2 with registers": lambda: hf.Dinov2WithRegistersForImageClassification(
        hf.Dinov2WithRegistersConfig(**_transformer_sizes())
    ),
    # Rotary positions need a head width that is a multiple of 4.
    "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**_transformer_sizes() | dict(num_attention_heads=3))),
    "dinov3 convnext": lambda: hf.DINOv3ConvNextModel(
        hf.DINOv3ConvNextConfig(hidden_sizes=[12, 20, 20, 28], depths=[1, 1, 1, 1], image_size=SIDE)
    ),
    "clip": lambda: hf.CLIPForImageClassification(
        hf.CLIPConfig(vision_config=_transformer_sizes(), text_config=_text_sizes() | _tokens(), num_labels=LABELS)
    ),
    "clip with text": lambda: hf.CLIPModel(
        hf.CLIPConfig(vision_config=_transformer_sizes(), text_config=_text_sizes() | _tokens(), projection_dim=20)
    ),
    "siglip": lambda: hf.SiglipForImageClassification(
        hf.SiglipConfig(vision_config=_transformer_sizes(), text_config=_text_sizes() | _tokens(), num_labels=LABELS)
    ),
    "siglip2": lambda: hf.Siglip2ForImageClassification(
        hf.Siglip2Config(
            vision_config=_transformer_sizes() | dict(num_patches=16),
            text_config=_text_sizes() | _tokens(),
            num_labels=LABELS,
        )
    ),
    "mobilevit": lambda: hf.MobileViTForImageClassification(
        hf.MobileViTConfig(
            image_size=SIDE,
            hidden_sizes=[12, 12, 12],
            neck_hidden_sizes=[8, 8, 12, 12, 12, 12, 20],
            num_labels=LABELS,
        )
    ),
    "mobilevitv2": lambda: hf.MobileViTV2ForImageClassification(
        hf.MobileViTV2Config(
            image_size=2 * SIDE,
            base_attn_unit_dims=[16, 16, 16],
            n_attn_blocks=[1, 1, 1],
            width_multiplier=0.25,
            num_labels=LABELS,
        )
    ),
    "pvtv2": lambda: hf.PvtV2ForImageClassification(hf.PvtV2Config(image_size=SIDE, **_pyramid_sizes())),
    "cvt": lambda: hf.CvtForImageClassification(
        hf.CvtConfig(
            patch_sizes=[7, 3],
            patch_stride=[4, 2],
            patch_padding=[2, 1],
            embed_dim=[12, 20],
            num_heads=[1, 2],
            depth=[1, 2],
            mlp_ratio=[2.0, 2.0],
            attention_drop_rate=[0.0, 0.0],
            drop_rate=[0.0, 0.0],
            drop_path_rate=[0.0, 0.0],
            qkv_bias=[True, True],
            cls_token=[False, True],
            qkv_projection_method=["dw_bn", "dw_bn"],
            kernel_qkv=[3, 3],
            padding_kv=[1, 1],
            stride_kv=[2, 2],
            padding_q=[1, 1],
            stride_q=[1, 1],
            num_labels=LABELS,
        )
    ),
    "levit": lambda: hf.LevitForImageClassification(
        hf.LevitConfig(
            image_size=2 * SIDE,
            hidden_sizes=[16, 20, 28],
            num_attention_heads=[1, 2, 2],
            depths=[1, 1, 1],
            key_dim=[4, 4, 4],
            mlp_ratio=[2, 2, 2],
            attention_ratio=[2, 2, 2],
            num_labels=LABELS,
        )
    ),
    "hiera": lambda: hf.HieraForImageClassification(
        hf.HieraConfig(
            image_size=[SIDE, SIDE],
            embed_dim=12,
            depths=[1, 1],
            num_heads=[1, 2],
            num_query_pool=1,
            masked_unit_size=[4, 4],
            masked_unit_attention=[True, False],
            num_labels=LABELS,
        )
    ),
    "convnext": lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(**_convnext_sizes())),
    "convnextv2": lambda: hf.ConvNextV2ForImageClassification(hf.ConvNextV2Config(**_convnext_sizes())),
    "resnet": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=12, hidden_sizes=[12, 20], depths=[1, 1], layer_type="basic", num_labels=LABELS)
    ),
    "detr": _detr,
    "yolos": lambda: hf.YolosForObjectDetection(
        hf.YolosConfig(**_transformer_sizes() | dict(image_size=[SIDE, SIDE]), num_detection_tokens=5)
    ),
    "segformer": lambda: hf.SegformerForSemanticSegmentation(
        hf.SegformerConfig(**_pyramid_sizes(), decoder_hidden_size=20)
    ),
    "upernet": lambda: hf.UperNetForSemanticSegmentation(
        hf.UperNetConfig(
            backbone_config=_swin_backbone(),
            hidden_size=20,
            pool_scales=[1, 2],
            auxiliary_in_channels=48,
            auxiliary_channels=12,
            num_labels=LABELS,
        )
    ),
    "maskformer": lambda: hf.MaskFormerForInstanceSegmentation(
        hf.MaskFormerConfig(
            backbone_config=_swin_backbone(),
            fpn_feature_size=32,
            mask_feature_size=32,
            decoder_config=hf.DetrConfig(**_detr_sizes()),
            num_labels=LABELS,
        )
    ),
    "mask2former": lambda: hf.Mask2FormerForUniversalSegmentation(
        hf.Mask2FormerConfig(
            backbone_config=_swin_backbone(),
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=20,
            encoder_layers=1,
            decoder_layers=2,
            dim_feedforward=28,
            num_attention_heads=2,
            num_queries=5,
            train_num_points=16,
            num_labels=LABELS,
        )
    ),
    "dpt depth": lambda: _dpt(hf.DPTForDepthEstimation),
    "dpt segmentation": lambda: _dpt(hf.DPTForSemanticSegmentation),
}
