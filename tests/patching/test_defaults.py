"""What stays float by what it does: text sides of models of transformers and of one's own, and answers."""

import re

import pytest
import torch
import transformers as hf
from torch import nn

import proxbit
from proxbit.config import BinarizationConfig
from proxbit.errors import PatternError
from proxbit.nn import latent_layers
from proxbit.patching import packed_layers, select

VIT = {f"encoder.layers.*.{name}" for name in ("attention.?_proj", "mlp.fc?")}
WORDS = {"vocab_size": 50}
DECODER = {"is_decoder": True, "add_cross_attention": True} | WORDS


def vit():
    sizes = dict(hidden_size=40, num_hidden_layers=1, num_attention_heads=2, intermediate_size=56)
    return hf.ViTModel(hf.ViTConfig(image_size=16, patch_size=8, **sizes))


def sizes(**changes):
    return hf.BertConfig(
        hidden_size=40, num_hidden_layers=1, num_attention_heads=2, intermediate_size=56, **DECODER, **changes
    )


def trocr(tied):
    config = hf.TrOCRConfig(
        d_model=40,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=56,
        tie_word_embeddings=tied,
        cross_attention_hidden_size=40,
        **WORDS,
    )
    return hf.VisionEncoderDecoderModel(encoder=vit(), decoder=hf.TrOCRForCausalLM(config))


def donut():
    swin = hf.DonutSwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4)
    bart = hf.MBartConfig(d_model=24, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=28, **DECODER)
    return hf.VisionEncoderDecoderModel(encoder=hf.DonutSwinModel(swin), decoder=hf.MBartForCausalLM(bart))


def gpt2():
    config = hf.GPT2Config(n_layer=1, n_head=2, n_embd=40, bos_token_id=1, eos_token_id=2, **DECODER)
    return hf.VisionEncoderDecoderModel(encoder=vit(), decoder=hf.GPT2LMHeadModel(config))


def bert(**changes):
    return hf.VisionEncoderDecoderModel(encoder=vit(), decoder=hf.BertLMHeadModel(sizes(**changes)))


def git():
    small = dict(hidden_size=40, num_hidden_layers=1, num_attention_heads=2, intermediate_size=56)
    return hf.GitForCausalLM(hf.GitConfig(vision_config=small | dict(image_size=16, patch_size=8), **small, **WORDS))


def pix2struct():
    text = dict(hidden_size=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, **WORDS)
    vision = dict(hidden_size=16, d_ff=16, d_kv=8, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(patch_embed_hidden_size=12, seq_len=8)
    return hf.Pix2StructForConditionalGeneration(hf.Pix2StructConfig(text_config=text, vision_config=vision))


def converted(model):
    """Names of what is 1-bit by default, with `*` for numbers."""
    names = [decision.name for decision in select(model, BinarizationConfig()) if decision.converted]
    return {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}


def reasons(model):
    return {decision.name: decision.reason for decision in select(model, BinarizationConfig())}


def short(names):
    """With `?` for the last letter of projections and numbered layers."""
    return {re.sub(r"[qkvo]_proj$", "?_proj", re.sub(r"fc[12]$", "fc?", name)) for name in names}


@pytest.mark.parametrize(
    "build", [lambda: trocr(False), lambda: trocr(True), bert, gpt2], ids=["trocr", "tied trocr", "bert", "gpt2"]
)
def test_the_decoder_of_words_stays(build):
    model = build()
    assert short(converted(model)) == VIT
    left = {name: reason for name, reason in reasons(model).items() if name.startswith("decoder.")}
    assert set(left.values()) <= {"text side", "head"}


def test_the_decoder_of_donut_stays():
    found = converted(donut())
    assert len(found) == 7
    assert all(name.startswith("encoder.encoder.layers.*.") for name in found)


def test_the_decoder_of_git_stays():
    """Its layers lie beside the picture side, and are no model of their own."""
    found = converted(git())
    assert len(found) == 6
    assert all(name.startswith("git.image_encoder.") for name in found)


def test_the_decoder_of_pix2struct_stays():
    """Its pictures come as rows of numbers with places, which go into embeddings too."""
    found = converted(pix2struct())
    assert len(found) == 6
    assert all(name.startswith("encoder.encoder.layer.*.") for name in found)


# By class: where its 1-bit layers are, and its text side.
LIKEWISE = {
    hf.AlignModel: ({"vision_model.encoder"}, {"text_model"}),
    hf.AltCLIPModel: ({"vision_model.encoder"}, {"text_model"}),
    hf.BlipForConditionalGeneration: ({"vision_model.encoder"}, {"text_decoder"}),
    hf.Blip2ForConditionalGeneration: (
        {"vision_model.encoder", "qformer.encoder", "language_projection"},
        {"language_model"},
    ),
    hf.ChineseCLIPModel: ({"vision_model.encoder"}, {"text_model"}),
    hf.Florence2ForConditionalGeneration: ({"model.vision_tower", "model.multi_modal_projector"}, {"model"}),
    hf.Idefics3ForConditionalGeneration: ({"model.vision_model", "model.connector"}, {"model"}),
    hf.InstructBlipForConditionalGeneration: (
        {"vision_model.encoder", "language_projection"},
        {"language_model", "qformer"},
    ),
    hf.Kosmos2ForConditionalGeneration: (
        {"vision_model.model", "image_to_text_projection.dense", "image_to_text_projection.x_attn"},
        {"text_model"},
    ),
    hf.LlavaForConditionalGeneration: ({"model.vision_tower", "model.multi_modal_projector"}, {"model"}),
    hf.MllamaForConditionalGeneration: ({"model.vision_model", "model.multi_modal_projector"}, {"model"}),
    hf.Owlv2ForObjectDetection: ({"owlv2.vision_model"}, {"owlv2"}),
    hf.PaliGemmaForConditionalGeneration: ({"model.vision_tower", "model.multi_modal_projector"}, {"model"}),
    hf.Qwen2VLForConditionalGeneration: ({"model.visual"}, {"model"}),
    hf.SmolVLMForConditionalGeneration: ({"model.vision_model", "model.connector"}, {"model"}),
    hf.VisionTextDualEncoderModel: ({"vision_model.layers"}, {"text_model"}),
}


def small(config):
    """The same with one layer a stack."""
    for key in ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "num_global_layers", "depth"):
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, 1)
    for key in config.sub_configs:
        small(getattr(config, key))
    return config


@pytest.mark.parametrize("kind", LIKEWISE, ids=lambda kind: kind.__name__)
def test_models_of_pictures_and_texts(kind):
    """On the meta device, as they are while they are loaded."""
    if kind is hf.VisionTextDualEncoderModel:
        config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(hf.ViTConfig(), hf.BertConfig())
    else:
        config = small(kind.config_class())
    with torch.device("meta"):
        model = kind(config)
    binarized, text = LIKEWISE[kind]
    assert {".".join(name.split(".")[:2]) for name in converted(model)} == binarized
    assert {name.split(".")[0] for name, reason in reasons(model).items() if reason == "text side"} == text


@pytest.mark.parametrize("kind", [hf.ViltModel, hf.BertModel], ids=lambda kind: kind.__name__)
def test_where_everything_lies_behind_words(kind):
    """ViLT has one stack for pictures and words: it is not chosen by default, but can be named."""
    with torch.device("meta"):
        model = kind(kind.config_class(num_hidden_layers=1))
    with pytest.raises(PatternError, match=r"text side\n(?s:.*)Name some with include"):
        select(model, BinarizationConfig())
    assert any(decision.converted for decision in select(model, BinarizationConfig(include=["encoder"])))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 20), nn.Linear(20, 16)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Eyes(nn.Module):
    """A picture side with an embedding, of places."""

    def __init__(self):
        super().__init__()
        self.look, self.where = nn.Conv2d(3, 16, 8, 8), nn.Embedding(4, 16)
        self.grid = nn.Embedding(9, 16)
        self.steps = nn.ModuleList([Block(), Block()])

    def forward(self, pictures):
        x = self.look(pictures).flatten(2).mT
        x = x + self.where(torch.arange(x.shape[1])) + self.grid.weight[: x.shape[1]]
        for step in self.steps:
            x = step(x)
        return x


class Mouth(nn.Module):
    """A text side."""

    def __init__(self):
        super().__init__()
        self.runes, self.where, self.steps = nn.Embedding(50, 16), nn.Embedding(9, 16), nn.ModuleList([Block()])

    def forward(self, runes, seen):
        x = self.runes(runes) + self.where(torch.arange(runes.shape[1])) + seen.mean(1, keepdim=True)
        for step in self.steps:
            x = step(x)
        return x


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.eyes, self.bridge, self.mouth, self.speak = Eyes(), Block(), Mouth(), nn.Linear(16, 50)

    def forward(self, pictures, runes):
        return self.speak(self.mouth(runes, self.bridge(self.eyes(pictures))))


class Flat(nn.Module):
    """The same with the layers of the text side beside the picture side."""

    def __init__(self):
        super().__init__()
        self.eyes, self.runes, self.steps, self.speak = (
            Eyes(),
            nn.Embedding(50, 16),
            nn.ModuleList([Block()]),
            nn.Linear(16, 50),
        )

    def forward(self, pictures, runes):
        x = self.runes(runes) + self.eyes(pictures).mean(1, keepdim=True)
        for step in self.steps:
            x = step(x)
        return torch.log_softmax(self.speak(x), dim=-1)


EYES = {"eyes.steps.*.up", "eyes.steps.*.down"}


@pytest.mark.parametrize(("kind", "more"), [(Nested, {"bridge.up", "bridge.down"}), (Flat, set())])
def test_a_model_of_ones_own(kind, more):
    model = kind()
    assert converted(model) == EYES | more
    pictures, runes = torch.randn(2, 3, 16, 16), torch.tensor([[1, 2, 3], [4, 5, 6]])
    proxbit.pack(proxbit.binarize(model))
    assert model(pictures, runes).shape == (2, 3, 50)


def test_answers_of_ones_own_stay():
    """Whatever they are called, and in whatever they are returned."""

    class Sorter(nn.Module):
        def __init__(self):
            super().__init__()
            self.eyes, self.verdict = Eyes(), nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 3), nn.Softmax(-1))
            self.place, self.turn = nn.Linear(16, 4), nn.Tanh()

        def forward(self, pictures):
            seen = self.eyes(pictures).mean(1)
            return {"scores": self.verdict(seen), "boxes": self.turn(self.place(seen))}

    assert converted(Sorter()) == EYES
    assert {reasons(Sorter())[name] for name in ("verdict.1", "place")} == {"head"}


class OwnConfig(hf.PreTrainedConfig):
    model_type = "own-sorter"


class Own(hf.PreTrainedModel):
    """A model of transformers without a base model."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.eyes, self.verdict = Eyes(), nn.Linear(16, 3)
        self.post_init()

    def forward(self, pixel_values):
        logits = self.verdict(self.eyes(pixel_values).mean(1))
        return hf.modeling_outputs.ImageClassifierOutput(logits=logits)


def test_the_answer_of_a_model_with_code_of_its_own_stays():
    assert converted(Own(OwnConfig())) == EYES


def test_a_weight_that_an_embedding_of_words_shares_stays():
    model = Nested()
    model.bridge = nn.Linear(16, 50, bias=False)
    model.bridge.weight = model.mouth.runes.weight
    assert converted(model) == EYES
    assert reasons(model)["bridge"] == "head"


def test_kinds_of_boxes_are_no_words():
    class Marked(nn.Module):
        def __init__(self):
            super().__init__()
            self.eyes, self.kinds, self.steps = Eyes(), nn.Embedding(2, 16), nn.ModuleList([Block()])

        def forward(self, pictures, kinds):
            x = self.eyes(pictures) + self.kinds(kinds)
            for step in self.steps:
                x = step(x)
            return x

    assert converted(Marked()) == EYES | {"steps.*.up", "steps.*.down"}


def test_patterns_come_first(tmp_path):
    """And a checkpoint has the layers that its configuration names, whatever the defaults are."""
    model = bert()
    config = BinarizationConfig(include=["decoder.bert.encoder", "encoder.layers"], modules_to_not_convert=["*.query"])
    names = [name for name, _ in latent_layers(proxbit.binarize(model, config))]
    assert any(name.startswith("decoder.bert.encoder.layer.0.crossattention") for name in names)
    assert not any(name.endswith("query") for name in names)
    model.save_pretrained(tmp_path / "latent")
    again = hf.VisionEncoderDecoderModel.from_pretrained(tmp_path / "latent")
    assert [name for name, _ in latent_layers(again)] == names
    proxbit.pack(model).save_pretrained(tmp_path / "packed")
    assert [n for n, _ in packed_layers(hf.VisionEncoderDecoderModel.from_pretrained(tmp_path / "packed"))] == names


def test_loading_chooses_as_in_memory(tmp_path):
    model = trocr(True)
    model.save_pretrained(tmp_path)
    loaded = hf.VisionEncoderDecoderModel.from_pretrained(tmp_path, quantization_config=BinarizationConfig())
    assert [name for name, _ in latent_layers(loaded)] == [name for name, _ in latent_layers(proxbit.binarize(model))]
