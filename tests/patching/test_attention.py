"""Attention modules are those that call the implementation; which of them learn a scale."""

import functools

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import proxbit
from families import TABLE
from proxbit.errors import PatternError
from proxbit.nn import BinaryProbabilities
from proxbit.nn.attention import binary_attention
from proxbit.patching.attention import attention_modules, learn_scales, learned_attentions, unlearn_scales
from tiny_models import FAMILIES

NAME = "test-recording"
# Without attention, or with one of their own.
WITHOUT = {"convnext", "convnextv2", "dinov3 convnext", "resnet", "mobilevit", "mobilevitv2", "swinv2", "pvtv2", "cvt"}
WITHOUT |= {"levit", "hiera"}


@pytest.fixture
def called(monkeypatch):
    """The modules that call an implementation, which is binary attention."""
    found = []

    def record(module, *operands, **options):
        found.append(module)
        return binary_attention(module, *operands, **options)

    AttentionInterface.register(NAME, record)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_that_call_the_implementation(family, called, crops):
    model = FAMILIES[family]().eval()
    if attention_modules(model):
        model.set_attn_implementation(NAME)
    with torch.no_grad():
        model(**TABLE[family].inputs(crops(2, TABLE[family].side)))
    assert set(attention_modules(model).values()) == set(called)
    assert bool(called) is (family not in WITHOUT)


def test_wrapped_functions_and_what_is_no_function():
    vit = FAMILIES["vit"]()
    attention = vit.vit.layers[0].attention

    class Wrapped(type(attention)):
        @functools.wraps(type(attention).forward)
        def forward(self, *arguments, **options):
            return type(attention).forward(self, *arguments, **options)

    vit.vit.layers[1].attention = Wrapped(vit.config)
    builtin = type("Builtin", (nn.Module,), {"forward": staticmethod(torch.relu)})()
    assert list(attention_modules(nn.ModuleList([builtin, vit]))) == [f"1.vit.layers.{i}.attention" for i in range(2)]


def test_those_that_run_as_binary_learn_unless_it_is_said_otherwise():
    model, config = FAMILIES["vit"](), proxbit.BinarizationConfig()
    names = list(attention_modules(model))
    assert learned_attentions(model, config) == ([], [])
    model.set_attn_implementation("proxbit_binary")
    assert learned_attentions(model, config) == (names, ["vit.layers.*.attention"])
    assert learned_attentions(model, config.replace(learned_attention=[])) == ([], [])
    model.set_attn_implementation("sdpa")
    for pattern in ("vit.layers.1", "*.1.attention"):
        assert learned_attentions(model, config.replace(learned_attention=[pattern])) == (names[1:], names[1:])
    with pytest.raises(PatternError, match="learned_attention: the pattern 'vit.layers.9' matches no module"):
        learned_attentions(model, config.replace(learned_attention=["vit.layers.9"]))


def test_an_error_leaves_the_model_as_it_was():
    model = FAMILIES["vit"]()
    with pytest.raises(PatternError, match="learned_attention"):
        proxbit.binarize(model, proxbit.BinarizationConfig(learned_attention=["*.mlp"]))
    assert not any(isinstance(module, BinaryProbabilities | proxbit.nn.BinaryLinear) for module in model.modules())


def test_scales_come_and_go():
    model = FAMILIES["vit"]().to(torch.bfloat16)
    before = list(model.state_dict())
    learn_scales(model, ["vit.layers.1.attention"])
    assert [name for name in model.state_dict() if name not in before] == [
        "vit.layers.1.attention.binary_probabilities.scale"
    ]
    assert model.vit.layers[1].attention.binary_probabilities.scale.dtype == torch.bfloat16
    unlearn_scales(model)
    assert list(model.state_dict()) == before
