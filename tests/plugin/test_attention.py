"""The attentions of proxbit, by name, in models of transformers."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import proxbit
from proxbit.errors import CheckpointError
from proxbit.nn import learned_modules
from proxbit.nn.attention import ATTENTIONS
from tiny_models import FAMILIES, SIDE


@pytest.mark.parametrize("family", ["vit", "dinov2", "siglip", "beit"])
@pytest.mark.parametrize("name", list(ATTENTIONS))
def test_every_model_that_takes_an_implementation_has_them(family, name, crops):
    model, pixels = FAMILIES[family]().eval(), crops(2, SIDE)
    with torch.no_grad():
        before = model(pixels).logits
        model.set_attn_implementation(name)
        after = model(pixels).logits
    assert not torch.equal(after, before)
    if name == "proxbit_int8":
        torch.testing.assert_close(after, before, rtol=0.05, atol=0.02)


def test_attentions_are_returned(crops):
    config = FAMILIES["vit"]().config
    config._attn_implementation = "proxbit_int8"
    model = hf.ViTForImageClassification(config).eval()
    result = model(crops(2, SIDE), output_attentions=True)
    assert len(result.attentions) == config.num_hidden_layers
    torch.testing.assert_close(result.attentions[0].sum(-1), torch.ones(2, 4, 17), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", list(ATTENTIONS))
def test_a_folder_remembers_nothing_and_loads_with_either(name, crops, tmp_path):
    model, pixels = FAMILIES["vit"]().eval(), crops(2, SIDE)
    model.set_attn_implementation(name)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation=name)
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    assert hf.AutoModelForImageClassification.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def learning(family="vit", **changes):
    """A model with a scale in each attention that is no default, binarized while it runs binary attention."""
    model = FAMILIES[family]()
    model.set_attn_implementation("proxbit_binary")
    proxbit.binarize(model, proxbit.BinarizationConfig(**changes))
    for number, scale in enumerate(scales(model).values()):
        torch.nn.init.constant_(scale, 0.5 + number)
    return model.eval()


def scales(model):
    return {name: p for name, p in model.named_parameters() if name.endswith("binary_probabilities.scale")}


def logits(model, pixels):
    with torch.no_grad():
        return model(pixels).logits


def load(folder, **options):
    return hf.AutoModelForImageClassification.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    ("family", "state"),
    [("vit", "latent"), ("dinov2", "packed"), ("clip", "latent"), ("beit", "packed"), ("swin", "packed")],
)
def test_learned_scales_are_saved_and_loaded(family, state, crops, tmp_path):
    model, pixels = learning(family), crops(2, SIDE)
    if state == "packed":
        proxbit.pack(model)
    expected = logits(model, pixels)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, attn_implementation="proxbit_binary")
    assert [float(scale.detach()) for scale in scales(again).values()] == [0.5, 1.5]
    assert all(module.calibrated for _, module in learned_modules(again))
    assert torch.equal(logits(again, pixels), expected)
    for scale in scales(again).values():
        torch.nn.init.constant_(scale, 3.0)
    assert not torch.equal(logits(again, pixels), expected)
    other = load(tmp_path)
    assert other.config._attn_implementation == "sdpa" and scales(other).keys() == scales(model).keys()
    assert not torch.equal(logits(other, pixels), expected)


def test_a_float_checkpoint_is_given_scales(crops, tmp_path):
    FAMILIES["vit"]().save_pretrained(tmp_path)
    config = proxbit.BinarizationConfig()
    model = load(tmp_path, quantization_config=config, attn_implementation="proxbit_binary")
    assert [float(scale.detach()) for scale in scales(model).values()] == [2.0, 2.0]
    assert not any(module.calibrated for _, module in learned_modules(model))
    assert model.config.quantization_config.learned_attention == ["vit.layers.*.attention"]
    assert bool(torch.isfinite(logits(model, crops(2, SIDE))).all())
    assert scales(load(tmp_path, quantization_config=config)) == {}


def test_a_checkpoint_without_scales_takes_the_mean_of_each_row(crops, tmp_path):
    """Whether it says that it has none, or is of a time when none had any."""
    model, pixels = learning(learned_attention=[]), crops(2, SIDE)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["quantization_config"].pop("learned_attention") == []
    for text in (file.read_text(), json.dumps(config)):
        file.write_text(text)
        again = load(tmp_path, attn_implementation="proxbit_binary")
        assert scales(again) == {} and torch.equal(logits(again, pixels), logits(model, pixels))


def test_a_scale_that_the_file_lacks(tmp_path):
    learning().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vit.encoder.layer.1.attention.binary_probabilities.scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.binary_probabilities\.scale is not in the check"):
        load(tmp_path)


def test_the_backbone_takes_its_scales_along(tmp_path):
    learning().save_pretrained(tmp_path)
    backbone = hf.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert [float(scale.detach()) for scale in scales(backbone).values()] == [0.5, 1.5]


def test_a_float_model_has_no_scales(crops, tmp_path):
    """What is left computes as the same layers do that never had any, and needs no plug-in."""
    pixels = crops(2, SIDE)
    for convert in (proxbit.dequantize, lambda model: proxbit.dequantize(proxbit.pack(model))):
        torch.manual_seed(0)
        model = convert(learning())
        torch.manual_seed(0)
        plain = convert(learning(learned_attention=[]))
        assert model.state_dict().keys() == FAMILIES["vit"]().state_dict().keys()
        assert torch.equal(logits(model, pixels), logits(plain, pixels))
