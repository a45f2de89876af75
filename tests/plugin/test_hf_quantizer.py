"""The plug-in: quantize on load, reload of latent and packed checkpoints, and what stands in their files."""

import copy
import json
import struct

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

import proxbit
from proxbit.config import BinarizationConfig
from proxbit.errors import ConfigError, LatentError
from proxbit.nn import LatentWeight, PackedConv2d, PackedLinear, latent_layers
from proxbit.patching import packed_layers
from proxbit.plugin import ProxbitHfQuantizer
from tiny_models import FAMILIES, SIDE, vit

PATCHES = "vit.embeddings.patch_embeddings.projection"
ON_DISK = {
    "attention.attention.query": (36, 36),
    "attention.attention.key": (36, 36),
    "attention.attention.value": (36, 36),
    "attention.output.dense": (36, 36),
    "intermediate.dense": (50, 36),
    "output.dense": (36, 50),
}
WEIGHTS = {*ON_DISK.values(), (36, 3, 8, 8)}
CONFIGS = {
    "defaults": BinarizationConfig(),
    "chosen": BinarizationConfig(
        weights="pc", include=["vit.layers", PATCHES], modules_to_not_convert=["*.0.mlp.fc1"], normalize="tensor"
    ),
    "adabin": BinarizationConfig(weights="adabin", include=["vit.layers", PATCHES]),
    "raw": BinarizationConfig(weights="bnn", include=["*.fc2", "classifier"], normalize="none", scale="fixed"),
}


class Shapes(TorchDispatchMode):
    """Within the context, the shapes of all floating point tensors with data that any operator returns."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.shapes.add(tuple(tensor.shape))
        return result


def make(**changes):
    """Weights large enough for every layer to be felt in the logits."""
    return hf.ViTForImageClassification(vit(initializer_range=0.3, **changes)).eval()


def in_state(state, config=None, **changes):
    model = proxbit.binarize(make(**changes), config)
    return model if state == "latent" else proxbit.pack(model)


def load(path, **kwargs):
    return hf.AutoModelForImageClassification.from_pretrained(path, **kwargs)


@torch.no_grad()
def logits(model, pictures):
    return model(pixel_values=pictures).logits


def parts(path):
    """What a safetensors file holds, read by hand: tensors, metadata, and the bytes after the header."""
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8:end])
    metadata = entries.pop("__metadata__")
    return {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in entries.items()}, metadata, content[end:]


def test_it_is_registered_with_transformers():
    config = AutoQuantizationConfig.from_dict(BinarizationConfig(weights="bc").to_dict())
    assert config == BinarizationConfig(weights="bc")
    assert isinstance(AutoHfQuantizer.from_config(config), ProxbitHfQuantizer)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_quantizing_on_load_equals_binarizing_in_hand(tmp_path, crops, config):
    model = make()
    model.save_pretrained(tmp_path)
    given = copy.deepcopy(config)
    loaded = load(tmp_path, quantization_config=given)
    proxbit.binarize(model, config)
    pictures = crops(4, 32)
    for training in (False, True):
        assert torch.equal(logits(loaded.train(training), pictures), logits(model.train(training), pictures))
    assert loaded.config.quantization_config == model.config.quantization_config
    assert str(loaded.binarization_report) == str(model.binarization_report)
    assert [name for name, _ in latent_layers(loaded)] == [name for name, _ in latent_layers(model)]
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert given == config


def test_a_float_checkpoint_cannot_be_loaded_as_packed(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"as a latent model only.*proxbit\.pack\(model\)"):
        load(tmp_path, quantization_config=BinarizationConfig(state="packed"))


@pytest.mark.parametrize(
    ("state", "value", "message"),
    [("float", float("nan"), "NaN"), ("latent", 0.0, "all zero")],
    ids=["nan", "zero row"],
)
def test_weights_that_cannot_be_binarized_are_found_on_load(tmp_path, state, value, message):
    model = make() if state == "float" else in_state("latent")
    with torch.no_grad():
        model.vit.layers[1].mlp.fc1.weight[3] = value
    model.save_pretrained(tmp_path)
    arguments = dict(quantization_config=BinarizationConfig()) if state == "float" else {}
    with pytest.raises(LatentError, match=rf"vit\.layers\.1\.mlp\.fc1\.weight.*{message}.*row 3"):
        load(tmp_path, **arguments)


@pytest.mark.parametrize("config", [CONFIGS["chosen"], CONFIGS["adabin"]], ids=["chosen", "adabin"])
def test_latent_reload_is_exact(tmp_path, crops, config):
    """Every tensor, the logits, and what the forward depends on beside the tensors."""
    model = in_state("latent", config)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    expected = model.state_dict()
    assert list(again.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    for (name, layer), (same, reloaded) in zip(latent_layers(model), latent_layers(again), strict=True):
        assert (name, type(layer)) == (same, type(reloaded))
        for attribute in ("pair", "normalize", "scale", "center", "mu", "hardened"):
            assert getattr(reloaded, attribute) == getattr(layer, attribute)
    pictures = crops(4, 32)
    for training in (False, True):
        assert torch.equal(logits(again.train(training), pictures), logits(model.train(training), pictures))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_packed_reload_has_the_same_logits(tmp_path, crops, config):
    model, pictures = in_state("latent", config), crops(4, 32)
    hard = logits(model, pictures)
    proxbit.pack(model).save_pretrained(tmp_path)
    again = load(tmp_path)
    assert [name for name, _ in packed_layers(again)] == [name for name, _ in packed_layers(model)]
    for packed in (model, again):
        torch.testing.assert_close(logits(packed, pictures), hard, rtol=0, atol=1e-4)
    assert (hard - logits(make(), pictures)).abs().max() > 0.1


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_trainable_while_latent(tmp_path, state):
    """What transformers calls trainable is that adapters can be."""
    model = in_state(state)
    model.save_pretrained(tmp_path)
    for each in (model, load(tmp_path)):
        assert each.is_quantized
        assert each.quantization_method == "proxbit"
        assert each.hf_quantizer.is_serializable()
        assert each.hf_quantizer.is_trainable
        assert each.hf_quantizer.is_qat_trainable is (state == "latent")
        assert each.config.quantization_config.state == state


def test_packed_layers_hold_no_float_weight(tmp_path):
    in_state("packed", BinarizationConfig(include=["vit.layers", PATCHES])).save_pretrained(tmp_path)
    model = load(tmp_path)
    layers = dict(packed_layers(model))
    assert type(layers.pop(PATCHES)) is PackedConv2d
    assert [type(layer) for layer in layers.values()] == [PackedLinear] * 12
    assert not any(isinstance(layer, nn.Linear) for layer in layers.values())
    assert {layer.weight.dtype for layer in layers.values()} == {torch.uint8}
    assert {key for layer in layers.values() for key, _ in layer.named_parameters()} == {"bias"}
    assert not WEIGHTS & {tuple(tensor.shape) for tensor in model.state_dict().values()}


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_loading_packed_never_makes_a_float_weight(tmp_path, monkeypatch, state):
    """No operator of the loading returns a tensor of that shape. Latent models and the classifier are the control."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    in_state(state, BinarizationConfig(include=["vit.layers", PATCHES])).save_pretrained(tmp_path)
    with Shapes() as seen:
        load(tmp_path)
    assert (3, 36) in seen.shapes
    assert seen.shapes & WEIGHTS == (WEIGHTS if state == "latent" else set())


def test_a_packed_checkpoint_makes_packed_layers_at_once(tmp_path, monkeypatch):
    """No latent layer is made and replaced, and the report is that of `pack`."""
    model = in_state("packed", BinarizationConfig(include=["vit.layers", PATCHES], activations="sign", rprelu=True))
    model.save_pretrained(tmp_path)
    made = []
    monkeypatch.setattr(LatentWeight, "__init__", lambda *args, **options: made.append(args))
    loaded = load(tmp_path)
    assert made == [] and len(packed_layers(loaded)) == 13
    assert str(loaded.binarization_report) == str(model.binarization_report)
    assert loaded.binarization_report.converted == model.binarization_report.converted


def test_dtype_changes_scales_and_leaves_bits(tmp_path, crops):
    model = in_state("packed", BinarizationConfig(include=["vit.layers", PATCHES]))
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.bfloat16)
    bits = {name: tensor for name, tensor in again.state_dict().items() if tensor.dtype == torch.uint8}
    assert set(bits) == {f"{name}.weight" for name, _ in packed_layers(model)}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in bits.items())
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.uint8, torch.bfloat16}
    pictures = crops(4, 32)
    torch.testing.assert_close(logits(again, pictures).float(), logits(model, pictures), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("config", "state"), list(zip(CONFIGS.values(), ["packed", "latent"] * 2)), ids=CONFIGS)
def test_saving_again_gives_the_same_bytes(tmp_path, state, config):
    first, second = tmp_path / "first", tmp_path / "second"
    in_state(state, config).save_pretrained(first)
    load(first).save_pretrained(second)
    assert (second / "config.json").read_bytes() == (first / "config.json").read_bytes()
    assert parts(second / "model.safetensors") == parts(first / "model.safetensors")
    stored = json.loads((first / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["format_version"], stored["state"]) == ("proxbit", 1, state)


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_keys_dtypes_and_shapes_on_disk(tmp_path, state):
    """A packed weight keeps the key of the float one, as U8 `[out, ceil(in / 8)]`, beside its row scales."""
    make().save_pretrained(tmp_path / "float")
    in_state(state).save_pretrained(tmp_path / state)
    expected, *_ = parts(tmp_path / "float" / "model.safetensors")
    for layer in range(2):
        for name, (rows, columns) in ON_DISK.items():
            key = f"vit.encoder.layer.{layer}.{name}.weight"
            assert expected[key] == ("F32", (rows, columns))
            if state == "packed":
                expected[key] = ("U8", (rows, (columns + 7) // 8))
                expected[f"{key}_scale"] = ("F32", (rows,))
    found, metadata, _ = parts(tmp_path / state / "model.safetensors")
    assert found == expected
    assert metadata == {"format": "pt"}


def test_a_checkpoint_of_format_1_stays_loadable(tmp_path, crops):
    """Written without proxbit: bits by numpy, the configuration as text. It must load for ever."""
    model, pictures = make(), crops(4, 32)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        for name, (rows, columns) in ON_DISK.items():
            key = f"vit.encoder.layer.{layer}.{name}.weight"
            positive = np.random.default_rng(layer).random((rows, columns)) < 0.5
            scale = torch.linspace(0.1, 0.4, rows)
            tensors[key] = torch.from_numpy(np.where(positive, 1, -1)).float() * scale[:, None]
            tensors[f"{key}_scale"] = scale
            tensors[f"{key} packed"] = torch.from_numpy(np.packbits(positive, axis=1, bitorder="little"))
    save_file({k: t for k, t in tensors.items() if k[-6:] not in ("_scale", "packed")}, tmp_path / "model.safetensors")
    expected = logits(load(tmp_path), pictures)
    bits = {key.removesuffix(" packed"): tensor for key, tensor in tensors.items() if key.endswith(" packed")}
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith(" packed")}
    save_file(kept | bits, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = json.loads(
        '{"format_version": 1, "include": ["vit.layers.*.attention.?_proj", "vit.layers.*.mlp.fc*"], '
        '"modules_to_not_convert": null, "normalize": "row", "quant_method": "proxbit", "scale": "ls", '
        '"state": "packed", "weights": "bnn++"}'
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits(load(tmp_path), pictures), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_sharded_checkpoints(tmp_path, crops, state):
    model, pictures = in_state(state), crops(4, 32)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path), pictures), logits(model, pictures))


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_the_backbone_of_a_checkpoint_can_be_loaded_alone(tmp_path, crops, state):
    """As a feature extractor, like any checkpoint of a classifier; and the other way round, with a new head."""
    model, pictures = in_state(state), crops(2, 32)
    model.save_pretrained(tmp_path / "classifier")
    backbone = hf.AutoModel.from_pretrained(tmp_path / "classifier", add_pooling_layer=False)
    with torch.no_grad():
        features = [each(pixel_values=pictures).last_hidden_state for each in (backbone, model.vit)]
    assert torch.equal(*features)
    backbone.save_pretrained(tmp_path / "backbone")
    again = load(tmp_path / "backbone", num_labels=5)
    assert logits(again, pictures).shape == (2, 5)
    assert torch.equal(again.vit(pixel_values=pictures).last_hidden_state, features[0])


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_a_class_that_lacks_what_was_binarized(tmp_path, crops, state):
    """Here the classifier, which is in the file and not in the backbone."""
    model = proxbit.binarize(FAMILIES["vit"](), BinarizationConfig(include=["*"])).eval()
    if state == "packed":
        proxbit.pack(model)
    model.save_pretrained(tmp_path)
    backbone = hf.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    with torch.no_grad():
        expected, found = (one(crops(2, SIDE)).last_hidden_state for one in (model.vit, backbone))
    assert torch.equal(found, expected)
    assert "classifier" not in backbone.config.quantization_config.include
