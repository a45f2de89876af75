"""The attentions of proxbit, by name, in models of transformers."""

import pytest
import torch
import transformers as hf

import proxbit  # noqa: F401
from proxbit.nn.attention import ATTENTIONS
from tiny_models import FAMILIES, SIDE


@pytest.mark.parametrize("name", list(ATTENTIONS))
@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "clip", "siglip", "beit"])
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
