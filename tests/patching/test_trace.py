"""One traced forward pass: the layers that read the result of a layer normalization, where nothing else does."""

import pytest
import torch
from torch import nn
from transformers import TimmWrapperConfig

import proxbit
from normed_block import D, Normed, affine
from proxbit.nn import BinaryLinear
from proxbit.patching import blank_image
from proxbit.patching.trace import norms_before, trace
from tiny_models import FAMILIES, SIDE


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def before(model, layers=None, **inputs):
    """What is found, on random inputs, with all linear layers as readers."""
    seen = trace(model, inputs or {"x": torch.randn(5, D)})
    return norms_before(seen, linears(model) if layers is None else layers)


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (lambda: Normed(affine()), True),
        (lambda: Normed(nn.LayerNorm(D, bias=False)), False),
        (lambda: Normed(nn.LayerNorm(D, elementwise_affine=False)), False),
        (lambda: Normed(nn.LayerNorm((1, D))), False),
        (lambda: Normed(nn.RMSNorm(D)), False),
        (lambda: Normed(affine(), peek=True), False),
        (lambda: Normed(affine(), give=True), False),
        (lambda: Normed(affine(), twice=True), False),
    ],
    ids=["plain", "no bias", "no weight", "two dimensions", "root mean square", "read elsewhere", "returned", "twice"],
)
def test_norms_that_only_layers_read(block, found):
    model = block()
    assert before(model, x=torch.randn(5, 1, D)) == ({"norm": [model.first, model.second]} if found else {})


def test_only_the_layers_that_are_asked_for_may_read():
    model = Normed(affine())
    assert before(model, [model.first]) == {}
    assert before(model, []) == {}


class Around(nn.Module):
    """A normalized tensor goes into a layer, and the layer is used once more in some other way."""

    def __init__(self, other):
        super().__init__()
        self.norm, self.layer, self.other = affine(), nn.Linear(D, D), other

    def forward(self, x):
        return self.layer(self.norm(x)) + self.other(self, x)


@pytest.mark.parametrize(
    "other",
    [
        lambda model, x: model.layer(x),
        lambda model, x: model.layer(input=x),
        lambda model, x: model.norm(input=x),
        lambda model, x: nn.functional.linear(model.norm(x), model.layer.weight),
    ],
    ids=["layer again", "layer again, by keyword", "norm again, by keyword", "weight alone"],
)
def test_what_is_called_twice_is_left_out(other):
    assert before(Around(other)) == {}
    assert list(before(Around(lambda model, x: x))) == ["norm"]


def test_a_hook_that_reads_counts():
    """It may do anything with what it sees."""
    model, kept = Normed(affine()), []
    handle = model.norm.register_forward_hook(lambda module, args, output: kept.append(output.sum()))
    assert before(model) == {}
    handle.remove()
    assert list(before(model)) == ["norm"]
    model.first.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert before(model) == {}


@pytest.mark.parametrize(
    ("activations", "center"), [("float", "restore"), ("int8", "none"), ("int4", "restore"), ("sign", "none")]
)
def test_what_a_latent_layer_does_with_its_input_is_part_of_it(activations, center):
    """Also what its activation quantizer does, which is a module of its own."""
    config = proxbit.BinarizationConfig(activations=activations, center=center)
    model = proxbit.binarize(Normed(affine()), config)
    assert isinstance(model.first, BinaryLinear)
    seen = trace(model, {"x": torch.randn(5, D)})
    assert [call.name for call in seen.calls] == ["norm", "first", "second"]
    assert norms_before(seen, linears(model)) == {"norm": [model.first, model.second]}


def test_the_model_is_left_as_it_was():
    """Also one that is partly in training mode, and one that fails."""
    model = Normed(affine(), peek=True).train()
    model.second.eval()
    for inputs in ({"x": torch.randn(5, D)}, {"x": torch.randn(5, D + 1)}):
        try:
            seen = trace(model, inputs)
        except RuntimeError:
            assert inputs["x"].shape[1] == D + 1
        assert [module.training for module in model.modules()] == [True, True, True, False]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [call.name for call in seen.calls] == ["norm", "first", "second"]
    assert [call.output.requires_grad for call in seen.calls] == [False] * 3
    assert seen.times[id(model.norm)] == 1
    assert {use.within for use in seen.uses_of(seen.calls[0].output)} == {model.first, model.second, None}


def test_a_blank_image_has_size_and_dtype_of_the_model():
    dtype = torch.bfloat16
    pixels = blank_image(FAMILIES["vit"]().to(dtype))["pixel_values"]
    assert (pixels.shape, pixels.dtype) == ((1, 3, SIDE, SIDE), dtype)
    assert not pixels.any()


def test_the_size_that_timm_keeps_in_its_own_configuration():
    model = nn.Linear(2, 2)
    model.config = TimmWrapperConfig(pretrained_cfg={"input_size": [3, 518, 392]})
    assert blank_image(model)["pixel_values"].shape == (1, 3, 518, 392)


def test_without_a_configuration():
    assert blank_image(nn.Linear(2, 2))["pixel_values"].shape == (1, 3, 224, 224)


def test_old_names_warn():
    with pytest.warns(
        DeprecationWarning, match=r"proxbit\.patching\.blank_picture is now proxbit\.patching\.blank_image"
    ):
        assert proxbit.patching.blank_picture is blank_image
    with pytest.warns(DeprecationWarning):
        assert RuntimeError in proxbit.patching.PICTURE_ERRORS
