"""What is fused is seen by running the model once: only where it cannot change the results."""

import copy

import pytest
import torch
from torch import nn
from transformers.activations import GELUActivation

import proxbit
from normed_block import D, Normed, OwnLayerNorm, ScaledLayerNorm, affine
from proxbit.errors import ModelStateError
from proxbit.nn import PackedLinear
from proxbit.patching import FusedActivation, FusedLayerNorm, unfuse_layers
from tiny_models import FAMILIES, SIDE


def packed(model, activations="float"):
    return proxbit.pack(
        proxbit.binarize(model, proxbit.BinarizationConfig(weights="bnn", activations=activations))
    ).eval()


def fused_layers(model):
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    return [n for n, m in layers.items() if m.gelu], [n for n, m in layers.items() if m.shared]


@pytest.mark.parametrize("activations", ["float", "int8", "int4", "sign"])
def test_a_vision_transformer(activations, crops):
    model = packed(FAMILIES["vit"](), activations)
    pixels = crops(3, SIDE)
    before, state = model(pixels).logits, list(model.state_dict())
    assert proxbit.fuse(model) is model
    gelus, shared = fused_layers(model)
    assert gelus == [f"vit.layers.{i}.mlp.fc1" for i in range(2)]
    projections = [f"vit.layers.{i}.attention.{name}_proj" for i in range(2) for name in "qkv"]
    # Each layer has learned thresholds, or a step, of its own: what they multiply is no longer the same.
    assert shared == ([] if activations in ("int4", "sign") else projections)
    normed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear) and module.norm]
    assert normed == [name for i in range(2) for name in [*projections[3 * i : 3 * i + 3], gelus[i]]]
    assert model.vit.layers[0].mlp.fc1.kernel.endswith("norm, gelu")
    assert list(model.state_dict()) == state
    with torch.no_grad():
        after = model(pixels).logits
    tolerance = {"float": 1e-5, "int8": 1e-2, "int4": 1e-1, "sign": 1e-1}[activations]
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance)


class Block(nn.Module):
    """A linear layer with something behind it."""

    def __init__(self, act, again=False, peek=False):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, D), act, nn.Linear(D, D)
        self.again, self.peek = again, peek

    def forward(self, x):
        hidden = self.fc1(x)
        result = self.act(hidden)
        if self.peek:
            result = result + hidden
        if self.again:
            result = self.act(result)
        return self.fc2(result)


@pytest.mark.parametrize("act", [nn.GELU(), GELUActivation()], ids=["torch", "transformers"])
def test_exact_gelus_are_fused(act):
    model = packed(Block(act))
    x = torch.randn(5, D)
    before = model(x)
    proxbit.fuse(model, {"x": x})
    assert isinstance(model.act, FusedActivation)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "block",
    [
        lambda: Block(nn.GELU(approximate="tanh")),
        lambda: Block(nn.ReLU()),
        lambda: Block(nn.Sequential(nn.GELU(), nn.Dropout(0.0))),
        lambda: Block(nn.GELU(), peek=True),
        lambda: Block(nn.GELU(), again=True),
    ],
    ids=["tanh", "relu", "nested with dropout", "sums are read elsewhere", "used twice"],
)
def test_what_is_left_alone(block):
    model = packed(block())
    x = torch.randn(5, D)
    before = model(x)
    proxbit.fuse(model, {"x": x})
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    if not isinstance(model.act, nn.Sequential):
        assert fused_layers(model) == ([], [])


@pytest.mark.parametrize(
    ("block", "fused"),
    [
        (lambda: Normed(affine()), True),
        (lambda: Normed(affine(OwnLayerNorm)), True),
        (lambda: Normed(affine(ScaledLayerNorm)), False),
        (lambda: Normed(nn.LayerNorm(D, bias=False)), False),
        (lambda: Normed(nn.LayerNorm(D, elementwise_affine=False)), False),
        (lambda: Normed(nn.RMSNorm(D)), False),
        (lambda: Normed(affine(), peek=True), False),
        (lambda: Normed(affine(), give=True), False),
        (lambda: Normed(affine(), twice=True), False),
    ],
    ids=[
        "plain",
        "class of its own",
        "with a factor",
        "no bias",
        "no weight",
        "root mean square",
        "read elsewhere",
        "returned",
        "used twice",
    ],
)
def test_layer_norms(block, fused):
    model = packed(block())
    x = torch.randn(5, D, requires_grad=True)
    before = model(x)
    (gradient,) = torch.autograd.grad((before[0] if model.give else before).sum(), x)
    state = {name: id(tensor) for name, tensor in model.named_parameters()}
    proxbit.fuse(model, {"x": x.detach()})
    assert isinstance(model.norm, FusedLayerNorm) == fused == (model.first.norm is not None)
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == state
    for again in (model, copy.deepcopy(model)):
        with torch.no_grad():
            torch.testing.assert_close(again(x), before, rtol=1e-5, atol=1e-5)
        result = again(x)
        torch.testing.assert_close(torch.autograd.grad((result[0] if model.give else result).sum(), x)[0], gradient)
    unfuse_layers(model)
    assert type(model.norm) is type(block().norm)
    assert torch.equal(model(x)[0], before[0])


def test_a_copy_has_its_own_layer_norm():
    model = packed(Normed(affine()))
    x = torch.randn(5, D)
    copied = copy.deepcopy(proxbit.fuse(model, {"x": x}))
    with torch.no_grad():
        expected = model(x)
        copied.norm.weight.zero_()
        assert torch.equal(model(x), expected)
        assert not torch.allclose(copied(x), expected)


def test_gradients_still_flow():
    model = packed(Block(nn.GELU()))
    x = torch.randn(5, D, requires_grad=True)
    model(x).square().sum().backward()
    expected, x.grad = x.grad, None
    proxbit.fuse(model, {"x": x.detach()})
    model(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_saved_and_dequantized_as_before(tmp_path, crops):
    model, pixels = packed(FAMILIES["vit"]()), crops(2, SIDE)
    before = model(pixels).logits
    proxbit.fuse(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert fused_layers(again) == ([], [])
    assert torch.equal(again(pixels).logits, before)
    plain = proxbit.dequantize(model)
    assert not any(isinstance(module, FusedActivation) for module in plain.modules())
    torch.testing.assert_close(plain(pixels).logits, before, rtol=1e-4, atol=1e-5)


def test_a_model_that_has_no_float_form_stays_fused():
    config = proxbit.BinarizationConfig(overrides={"vit.layers.1.mlp.fc2": {"rprelu": True}})
    model = proxbit.fuse(proxbit.pack(proxbit.binarize(FAMILIES["vit"](), config)))
    before = fused_layers(model)
    with pytest.raises(ModelStateError, match=r"^vit\.layers\.1\.mlp\.fc2: A layer with an RPReLU has no plain"):
        proxbit.dequantize(model)
    assert fused_layers(model) == before and len(before[0]) == 2


def test_fusing_twice_is_fusing_once():
    model = proxbit.fuse(proxbit.fuse(packed(FAMILIES["vit"]())))
    assert not isinstance(model.vit.layers[0].mlp.activation_fn.original, FusedActivation)
    assert len(fused_layers(model)[0]) == 2


def test_only_packed_models():
    with pytest.raises(ModelStateError, match="^fuse takes a packed model, this one is float"):
        proxbit.fuse(FAMILIES["vit"]())


def test_a_model_that_takes_no_picture_alone_needs_inputs():
    model = packed(Block(nn.GELU()))
    with pytest.raises(ModelStateError, match=r"Block takes no image alone .*fuse\(model, inputs="):
        proxbit.fuse(model)


@pytest.mark.parametrize("order", [("gate", "up"), ("up", "gate")])
def test_a_gated_block_has_its_gelu_on_the_gate_alone(order):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down, self.act = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D), nn.GELU()

        def forward(self, x):
            read = {name: getattr(self, name)(x) for name in order}
            return self.down(self.act(read["gate"]) * read["up"])

    model, x = packed(Gated()), torch.randn(5, D)
    before = model(x)
    proxbit.fuse(model, {"x": x})
    assert (model.gate.gelu, model.up.gelu, isinstance(model.act, FusedActivation)) == (True, False, True)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
