"""Adapters of PEFT on latent layers, as PEFT makes them by itself: used, but never merged into the signs."""

import copy

import pytest
import torch
import transformers as hf
from peft import HRAConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model

import proxbit
from proxbit.errors import ModelStateError
from proxbit.nn import latent_layers
from proxbit.patching import state_of
from tiny_models import FAMILIES, SIDE, vit

TARGETS = ["q_proj", "fc1"]


def latent():
    """The same at every call."""
    torch.manual_seed(3)
    return proxbit.binarize(hf.ViTForImageClassification(vit())).eval()


def adapted(**changes):
    """With adapters that are felt."""
    model = latent()
    torch.manual_seed(4)
    options = {"r": 2, "lora_alpha": 1, "target_modules": TARGETS, "init_lora_weights": False} | changes
    return get_peft_model(model, LoraConfig(**options)).eval()


@torch.no_grad()
def logits(model, pictures):
    return model(pixel_values=pictures).logits


def latents(model):
    return {name: layer.weight.detach().clone() for name, layer in latent_layers(model)}


@pytest.mark.parametrize(
    ("merge", "safe", "copied"),
    [("merge_and_unload", False, True), ("merge_and_unload", True, False), ("merge_adapter", False, False)],
)
def test_merging_is_refused_and_nothing_changes(merge, safe, copied, crops):
    model = copy.deepcopy(adapted()) if copied else adapted()
    pictures = crops(2, SIDE)
    held, expected = latents(model), logits(model, pictures)
    with pytest.raises(ModelStateError, match=r"latent layer: only the signs .*proxbit\.dequantize\(model\)"):
        getattr(model, merge)(safe_merge=safe)
    assert torch.equal(logits(model, pictures), expected)
    assert all(torch.equal(weight, held[name]) for name, weight in latents(model).items())
    assert state_of(model.unload()) == "latent"


def test_merging_goes_once_it_is_dequantized(crops, tmp_path):
    """In place, and where the message says: with the adapter that was saved."""
    model, pictures = adapted(), crops(2, SIDE)
    expected = logits(model, pictures)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(proxbit.dequantize(latent()), tmp_path).merge_and_unload()
    proxbit.dequantize(model)
    for merged in (loaded, model.merge_and_unload()):
        assert state_of(merged) == "float"
        torch.testing.assert_close(logits(merged, pictures), expected, rtol=1e-6, atol=1e-6)


def test_packed_under_its_adapters(crops):
    model, pictures = adapted(), crops(2, SIDE)
    expected = logits(model, pictures)
    proxbit.pack(model)
    torch.testing.assert_close(logits(model, pictures), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelStateError, match="packed layer: one bit a weight"):
        model.merge_and_unload()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_starts_that_change_the_weight_are_refused(start):
    model = latent()
    held = latents(model)
    with pytest.raises(ModelStateError, match=f"init_lora_weights='{start}'.*'gaussian'"):
        get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=start))
    assert all(torch.equal(weight, held[name]) for name, weight in latents(model).items())


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "eva"])
def test_other_starts_are_as_they_were(start):
    model = adapted(init_lora_weights=start)
    assert all(torch.equal(a, b) for a, b in zip(latents(model).values(), latents(latent()).values(), strict=True))


def test_dora_is_refused():
    with pytest.raises(ModelStateError, match="DoRA computes with the norms of the float weight"):
        adapted(use_dora=True)


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=TARGETS),
        LoKrConfig(r=2, target_modules=TARGETS),
        IA3Config(target_modules=TARGETS, feedforward_modules=["fc1"]),
        HRAConfig(r=2, target_modules=TARGETS),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_adapters_are_not_merged_either(config):
    model = get_peft_model(latent(), config)
    with pytest.raises(ModelStateError, match="cannot be merged into a latent layer"):
        model.merge_and_unload()


def test_convolutions_too():
    """LoRA makes its convolutions with the class of the layer, which would be 1-bit as well."""
    model = proxbit.binarize(FAMILIES["resnet"]())
    target = r".*layers\.0\.layer\.0\.convolution"
    with pytest.raises(ModelStateError, match="LoRA makes its convolutions .* LoHaConfig"):
        get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=target))
    with pytest.raises(ModelStateError, match="cannot be merged into a latent layer"):
        get_peft_model(model, LoHaConfig(r=2, target_modules=target)).merge_and_unload()


def test_weighted_adapters_and_a_trained_head(crops, tmp_path):
    """Adapters are added to each other, not to the layer; a head beside them is saved with them."""
    pictures = crops(2, SIDE)
    model = adapted(modules_to_save=["classifier"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")
    model.set_adapter("both")
    with pytest.raises(ModelStateError, match="cannot be merged"):
        model.merge_and_unload()
    model.set_adapter("default")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias += 1
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = PeftModel.from_pretrained(latent(), tmp_path).eval()
    torch.testing.assert_close(logits(again, pictures), logits(model, pictures))


def test_what_was_merged_before_is_not_taken_off_signs():
    torch.manual_seed(3)
    model = get_peft_model(
        hf.ViTForImageClassification(vit()), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    )
    model.merge_adapter()
    proxbit.binarize(model, proxbit.BinarizationConfig(include=["*.base_layer"]))
    with pytest.raises(ModelStateError, match="latent layer"):
        model.unmerge_adapter()


def test_float_layers_are_merged_as_ever(crops):
    """Beside latent ones, and in a model without any."""
    pictures = crops(2, SIDE)
    for model in (latent(), hf.ViTForImageClassification(vit())):
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["classifier"], init_lora_weights=False)).eval()
        expected = logits(tuned, pictures)
        torch.testing.assert_close(logits(tuned.merge_and_unload(), pictures), expected)
