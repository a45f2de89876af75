"""LoRA adapters on packed models, with PEFT itself: they alone are trained, saved and loaded; merging is refused."""

import copy
import importlib.util
import sys

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import proxbit
from proxbit.errors import ConfigError, ModelStateError
from proxbit.patching import packed_layers, state_of
from proxbit.plugin.adapters import PackedLora
from tiny_models import LABELS, SIDE, vit

TARGETS = ["q_proj", "v_proj", "fc1", "fc2"]


def lora(**changes):
    return LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": TARGETS, **changes})


def packed(activations="float"):
    """The same at every call: what a folder would give."""
    torch.manual_seed(3)
    model = hf.ViTForImageClassification(vit())
    return proxbit.pack(proxbit.binarize(model, proxbit.BinarizationConfig(activations=activations))).eval()


def adapted(activations="float", **changes):
    return get_peft_model(packed(activations), proxbit.packed_lora(lora(**changes)))


def stirred(model):
    """Adapters that are felt: B starts at zero."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.eval()


@torch.no_grad()
def logits(model, pictures):
    return model(pixel_values=pictures).logits


def bits(model):
    return {name.replace(".base_layer", ""): layer.weight.clone() for name, layer in packed_layers(model)}


def test_adapters_start_at_nothing_and_stand_beside_the_bits(crops):
    pictures = crops(4, SIDE)
    model = adapted()
    layers = [module for module in model.modules() if isinstance(module, PackedLora)]
    assert len(layers) == 8
    assert {layer.base_layer.weight.dtype for layer in layers} == {torch.uint8}
    torch.testing.assert_close(logits(model, pictures), logits(packed(), pictures))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 16
    assert all("lora_A" in name or "lora_B" in name for name in trained)


@pytest.mark.parametrize("activations", ["float", "int8", "sign"])
def test_the_output_is_the_packed_layers_and_ba(activations):
    """Of one layer, with the formula written out: the adapter reads floats whatever the layer makes of them."""
    layer = stirred(adapted(activations)).get_submodule("base_model.model.vit.layers.1.mlp.fc1")
    x = torch.randn(5, 36)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), layer.base_layer(x) + (x @ a.T @ b.T) * 8 / 2)


def test_train_save_load(crops, tmp_path):
    """With the Trainer: the loss falls, only adapters change, and they alone are in the file."""
    pictures, labels = crops(6, SIDE), torch.arange(6) % LABELS
    model = adapted("int8")
    before, start = copy.deepcopy(model.state_dict()), float(model(pixel_values=pictures, labels=labels).loss)
    examples = [{"pixel_values": p, "labels": int(label)} for p, label in zip(pictures, labels)]
    arguments = hf.TrainingArguments(
        tmp_path / "run",
        max_steps=20,
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    hf.Trainer(model=model, args=arguments, train_dataset=examples).train()
    assert float(model.eval()(pixel_values=pictures, labels=labels).loss) < 0.9 * start
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if "lora_" in key}
    model.save_pretrained(tmp_path / "adapter")
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(file) == 16
    assert all("lora_" in key for key in file)
    config = proxbit.packed_lora(LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(packed("int8"), tmp_path / "adapter", config=config)
    torch.testing.assert_close(logits(again, pictures), logits(model, pictures))


def test_merging_is_refused_and_nothing_changes(crops):
    pictures = crops(2, SIDE)
    model = stirred(adapted())
    held, expected = bits(model), logits(model, pictures)
    for merge in (model.merge_and_unload, model.merge_adapter, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ModelStateError, match="one bit a weight .* cannot hold .*proxbit.dequantize"):
            merge()
    torch.testing.assert_close(logits(model, pictures), expected)
    assert all(torch.equal(weight, held[name]) for name, weight in bits(model).items())
    assert state_of(model.unload()) == "packed"


def test_merging_goes_in_place_once_it_is_dequantized(crops):
    """Under its adapters, and with a second one that is made afterwards."""
    pictures = crops(2, SIDE)
    model = stirred(adapted())
    expected = logits(model, pictures)
    proxbit.dequantize(model)
    model.add_adapter("other", proxbit.packed_lora(lora()))
    model.merge_adapter()
    torch.testing.assert_close(logits(model, pictures), expected, rtol=1e-6, atol=1e-5)


def test_merging_goes_where_the_message_says(crops, tmp_path):
    """Into the float layers of the same model."""
    pictures = crops(2, SIDE)
    model = stirred(adapted())
    expected = logits(model, pictures)
    model.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(proxbit.dequantize(packed()), tmp_path).merge_and_unload()
    assert state_of(merged) == "float"
    torch.testing.assert_close(logits(merged, pictures), expected, rtol=1e-4, atol=1e-4)


def test_adapters_before_fusing(crops):
    """Fused afterwards, layers with adapters keep their neighbours; fused before, they take no adapter."""
    pictures = crops(2, SIDE)
    model = stirred(adapted(target_modules=["fc1", "v_proj"]))
    expected = logits(model, pictures)
    torch.testing.assert_close(logits(proxbit.fuse(model, {"pixel_values": pictures}), pictures), expected)
    fused = [layer for _, layer in packed_layers(model) if layer.norm is not None or layer.shared is not None]
    assert fused != []
    with pytest.raises(ModelStateError, match="Add adapters first"):
        get_peft_model(proxbit.fuse(packed()), proxbit.packed_lora(lora()))


def test_two_adapters(crops):
    pictures = crops(2, SIDE)
    model = stirred(adapted())
    first = logits(model, pictures)
    model.add_adapter("other", proxbit.packed_lora(lora(r=3)))
    model.set_adapter("other")
    torch.testing.assert_close(logits(model, pictures), logits(packed(), pictures))
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, pictures), first)


def test_what_needs_the_float_weight_is_refused():
    for start in ("pissa", "olora"):
        with pytest.raises(ConfigError, match=f"'{start}' starts from the float weight"):
            proxbit.packed_lora(LoraConfig(target_modules=TARGETS, init_lora_weights=start))
    with pytest.raises(ValueError, match="Invalid or unsupported variant"):
        adapted(use_dora=True)


def test_all_linear_layers_are_named(crops):
    """PEFT would pass over the packed layers; by the names that the message gives it adapts them, and no head."""
    with pytest.raises(ConfigError, match=r"'all-linear'.*target_modules=list\(model.binarization_report.converted\)"):
        proxbit.packed_lora(LoraConfig(target_modules="all-linear"))
    model = packed()
    names = list(model.binarization_report.converted)
    tuned = get_peft_model(model, proxbit.packed_lora(LoraConfig(r=2, target_modules=names)))
    assert len([module for module in tuned.modules() if isinstance(module, PackedLora)]) == len(names) == 12
    assert type(tuned.base_model.model.classifier) is torch.nn.Linear


def test_without_it_peft_says_that_it_does_not_know_the_layer():
    with pytest.raises(ValueError, match=r"PackedLinear.* is not supported"):
        get_peft_model(packed(), lora())


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    specification = importlib.util.find_spec("proxbit.plugin.adapters")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'proxbit\[peft\]'"):
        specification.loader.exec_module(importlib.util.module_from_spec(specification))
