"""Models of transformers that are made of others, tiny and with random weights, and how to ask them and their parts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn

SIZES = dict(image_size=32, patch_size=8, hidden_size=40, num_hidden_layers=2, num_attention_heads=4)
VISION = SIZES | dict(intermediate_size=56)
TOKENS = torch.tensor([[3, 4, 2], [5, 6, 2]])


class Framed(hf.PreTrainedModel):
    """A model of the user's own, around one of transformers."""

    config_class = hf.ViTConfig
    _supports_sdpa = True

    def __init__(self, config: hf.ViTConfig, inside: nn.Module | None = None) -> None:
        super().__init__(config)
        self.inside = hf.ViTModel(config) if inside is None else inside
        self.score = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.score(self.inside(pixel_values).last_hidden_state[:, 0])


def _text(kind: type, **more) -> hf.PreTrainedConfig:
    return kind(vocab_size=50, hidden_size=40, intermediate_size=56, num_hidden_layers=1, num_attention_heads=4, **more)


def _clip() -> nn.Module:
    text = _text(hf.CLIPTextConfig, bos_token_id=1, eos_token_id=2, pad_token_id=0).to_dict()
    vision = hf.CLIPVisionConfig(**VISION, projection_dim=24).to_dict()
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))


def _siglip() -> nn.Module:
    text = _text(hf.SiglipTextConfig, projection_size=40, bos_token_id=1, eos_token_id=2, pad_token_id=0).to_dict()
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=hf.SiglipVisionConfig(**VISION).to_dict()))


def _captioner() -> nn.Module:
    sizes = dict(n_layer=1, n_head=2, n_embd=40, vocab_size=50, bos_token_id=1, eos_token_id=2)
    decoder = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, add_cross_attention=True, is_decoder=True))
    return hf.VisionEncoderDecoderModel(encoder=hf.ViTModel(hf.ViTConfig(**VISION)), decoder=decoder)


def _dual() -> nn.Module:
    parts = hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)), hf.BertModel(_text(hf.BertConfig))
    return hf.VisionTextDualEncoderModel(vision_model=parts[0], text_model=parts[1])


def _llava() -> nn.Module:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=_text(hf.LlamaConfig, bos_token_id=1, eos_token_id=2, pad_token_id=0),
        image_token_index=49,
    )
    return hf.LlavaForConditionalGeneration(config)


def _segmenter() -> nn.Module:
    backbone = hf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4,
        out_features=["stage1", "stage2"],
    )  # fmt: skip
    sizes = dict(hidden_size=16, pool_scales=[1], num_labels=3, use_auxiliary_head=False)
    return hf.UperNetForSemanticSegmentation(hf.UperNetConfig(backbone_config=backbone, **sizes))


@dataclass(frozen=True)
class Whole:
    """A model that is made of others.

    Args:
        make: a new one.
        part: the name of the one that sees the picture.
        ask: the answer of the whole to pictures.
        from_whole: whether transformers loads that part from the folder of the whole.
    """

    make: Callable[[], nn.Module]
    part: str
    ask: Callable[[nn.Module, Tensor], Tensor]
    from_whole: bool = False


def _both(model: nn.Module, pictures: Tensor) -> Tensor:
    return model(input_ids=TOKENS, pixel_values=pictures).logits_per_image


def _talk(model: nn.Module, pictures: Tensor) -> Tensor:
    return model(input_ids=torch.tensor([[1] + [49] * 16 + [5]] * 2), pixel_values=pictures).logits


def _features(model: nn.Module, pictures: Tensor) -> Tensor:
    """Without the head of convolutions, whose rounding differs with the place of its weights in memory."""
    return model.backbone(pictures).feature_maps[-1]


WHOLES = {
    "CLIP": Whole(_clip, "vision_model", _both, from_whole=True),
    "SigLIP": Whole(_siglip, "vision_model", _both, from_whole=True),
    "encoder and decoder": Whole(
        _captioner, "encoder", lambda model, pictures: model(pictures, decoder_input_ids=TOKENS).logits
    ),
    "dual encoder": Whole(_dual, "vision_model", _both),
    "LLaVA": Whole(_llava, "model.vision_tower", _talk),
    "UperNet": Whole(_segmenter, "backbone", _features),
    "one's own": Whole(lambda: Framed(hf.ViTConfig(**VISION)), "inside", lambda model, pictures: model(pictures)),
}


def answer_of_part(model: nn.Module, pictures: Tensor) -> Tensor:
    """What such a part says to pictures."""
    outputs = model(pictures)
    return outputs.feature_maps[-1] if "feature_maps" in outputs else outputs.last_hidden_state
