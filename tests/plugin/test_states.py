"""`binarize`, `pack`, `dequantize` as users call them: states, sizes, new processes, and plain modules."""

import copy
import json
import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from torch import nn

import proxbit
from proxbit.errors import ConfigError, LatentError, ModelStateError, PatternError
from proxbit.nn import BinaryConv2d, BinaryLinear, PackedConv2d, PackedLinear
from proxbit.patching import state_of
from proxbit.quantizers import PAIRS, catalog
from tiny_models import FAMILIES, vit

WITH_PLUGIN = """
import sys, numpy, torch, proxbit
from transformers import AutoModelForImageClassification
pictures, result, *folders = sys.argv[1:]
for number, folder in enumerate(folders):
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        logits = model(pixel_values=torch.from_numpy(numpy.load(pictures))).logits
    numpy.save(f"{result}{number}.npy", logits.numpy())
"""
WITHOUT_PLUGIN = WITH_PLUGIN.replace(", proxbit", "") + "    assert 'proxbit' not in sys.modules\n"

DEQUANTIZE = {"function": proxbit.dequantize, "method": lambda model: model.dequantize()}


def make(**changes):
    """Weights large enough for every layer to be felt in the logits."""
    return hf.ViTForImageClassification(vit(initializer_range=0.3, **changes)).eval()


@torch.no_grad()
def logits(model, pictures):
    return model(pixel_values=pictures).logits


@pytest.fixture
def process(tmp_path, crops):
    """A function that runs a program in a new process on some folders: the process, and the logits it left."""
    np.save(tmp_path / "pictures.npy", crops(4, 32).numpy())

    def run(program, *folders):
        arguments = [tmp_path / "pictures.npy", tmp_path / "logits", *folders]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)], env=environment, capture_output=True, text=True
        )
        return done, [torch.from_numpy(np.load(file)) for file in sorted(tmp_path.glob("logits*.npy"))]

    return run


def test_states_of_a_transformers_model(crops):
    """Each call changes the model in place and returns it; latent hard, packed and dequantized compute the same."""
    model, pictures = make(), crops(4, 32)
    start = logits(model, pictures)
    states, results = [], []
    for convert in (proxbit.binarize, proxbit.pack, proxbit.dequantize):
        assert convert(model) is model
        states.append(state_of(model))
        results.append(logits(model, pictures))
    assert states == ["latent", "packed", "float"]
    assert (results[0] - start).abs().max() > 0.1
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-4)


def test_transformers_knows_the_state():
    model = make()
    proxbit.binarize(model, proxbit.BinarizationConfig(weights="parq"))
    assert (model.is_quantized, model.config.quantization_config.state) == (True, "latent")
    proxbit.pack(model)
    assert (model.is_quantized, model.config.quantization_config.state) == (True, "packed")
    assert model.config.quantization_config.weights == "parq"
    proxbit.dequantize(model)
    assert not model.is_quantized
    assert "quantization_config" not in model.config.to_dict()


WRONG = [
    ([], proxbit.pack, r"pack takes a latent model, this one is float: call proxbit\.binarize"),
    ([], proxbit.dequantize, "dequantize takes a latent or packed model; this one is float already"),
    ([proxbit.binarize], proxbit.binarize, "is latent already; binarize takes a float model"),
    ([proxbit.pack], proxbit.binarize, "is packed already; binarize takes a float model"),
    ([], proxbit.pack, "this one is packed: it is packed already"),
    ([proxbit.dequantize], proxbit.pack, "this one is float"),
    ([], proxbit.dequantize, "is float already"),
]


@pytest.mark.parametrize("build", [make, lambda: nn.Sequential(nn.Linear(8, 8))], ids=["transformers", "plain"])
def test_calls_in_the_wrong_state(build):
    """One after the other, of a model on its way through the states."""
    model = build()
    for path, call, message in WRONG:
        for convert in path:
            convert(model)
        with pytest.raises(ModelStateError, match=message):
            call(model)


def test_what_is_no_configuration():
    model, others = make(), ("w1a8", {"weights": "bnn"}, hf.BitsAndBytesConfig(load_in_8bit=True))
    for other in others:
        for call in (proxbit.binarize, proxbit.equalize):
            with pytest.raises(ConfigError, match=r"no BinarizationConfig.*get_recipe\('w1a8'\)\.binarization\(\)"):
                call(model, config=other)
    assert state_of(model) == "float"


@pytest.mark.parametrize("value", [float("nan"), 0.0], ids=["nan", "zero row"])
def test_errors_leave_the_model_as_it_was(crops, value):
    """Still float after a failed `binarize`, still latent after a failed `pack`, for transformers too."""
    model, pictures = make(), crops(2, 32)
    broken = model.vit.layers[1].mlp.fc2.weight.detach()
    good = broken.clone()
    for convert, state in ((proxbit.binarize, "float"), (proxbit.pack, "latent")):
        before, config = logits(model, pictures), model.config.to_json_string()
        report = vars(model).get("binarization_report")
        broken[0] = value
        with pytest.raises(LatentError, match=r"vit\.layers\.1\.mlp\.fc2\.weight"):
            convert(model)
        broken.copy_(good)
        assert state_of(model) == state
        assert torch.equal(logits(model, pictures), before)
        assert model.config.to_json_string() == config
        assert vars(model).get("binarization_report") is report
        convert(model)


def test_what_was_binarized_in_a_part_is_that_parts(crops):
    """A whole around it, whether it shares its configuration or not, is packed and made float."""
    clip, model, pictures = FAMILIES["clip"]().eval(), make(), crops(2, 32)
    before, hard = clip.config.to_json_string(), logits(proxbit.binarize(clip.vision_model) and clip, pictures)
    proxbit.pack(clip)
    assert clip.config.quantization_config.state == clip.vision_model.config.quantization_config.state == "packed"
    proxbit.dequantize(clip)
    assert clip.config.to_json_string() == before
    torch.testing.assert_close(logits(clip, pictures), hard, rtol=0, atol=1e-4)
    before = model.config.to_json_string()
    proxbit.binarize(model.vit)
    hard = logits(model, pictures)
    proxbit.dequantize(proxbit.pack(model))
    assert model.config.to_json_string() == before
    torch.testing.assert_close(logits(model, pictures), hard, rtol=0, atol=1e-4)


def test_a_float_model_again_can_be_binarized_again(crops):
    """Signs and scales of signs times scales are the same."""
    model, pictures = proxbit.pack(proxbit.binarize(make())), crops(2, 32)
    before = logits(model, pictures)
    proxbit.binarize(proxbit.dequantize(model))
    torch.testing.assert_close(logits(model, pictures), before, rtol=0, atol=1e-4)


def test_a_new_process_computes_the_same(tmp_path, crops, process):
    """Latent, packed in one file, and packed in several."""
    model, pictures = proxbit.binarize(make()), crops(4, 32)
    model.save_pretrained(tmp_path / "latent")
    hard = logits(model, pictures)
    proxbit.pack(model).save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    done, results = process(WITH_PLUGIN, *(tmp_path / name for name in ("latent", "packed", "shards")))
    assert done.returncode == 0, done.stderr
    assert len(results) == 3
    for result in results:
        torch.testing.assert_close(result, hard, rtol=0, atol=1e-4)


def steep(slope=2.0):
    """A pair of plain functions."""
    return proxbit.compose(lambda w, mu: (slope * w).clamp(-1, 1), lambda p, mu: (mu * p).tanh())


def test_a_pair_of_the_user_goes_with_the_model(tmp_path, crops, process, monkeypatch):
    """By name and parameters. Where it is not registered latent models say so, and packed ones do not need it."""
    for owner, name in ((PAIRS, "_entries"), (catalog, "_FACTORIES"), (catalog, "_MADE")):
        monkeypatch.setattr(owner, name, dict(getattr(owner, name)))
    proxbit.register_pair("steep", steep)
    config = proxbit.BinarizationConfig(weights="steep", pair_parameters={"slope": 0.5})
    model, pictures = proxbit.binarize(make(), config), crops(4, 32)
    model.save_pretrained(tmp_path / "latent")
    stored = json.loads((tmp_path / "latent" / "config.json").read_text())["quantization_config"]
    assert (stored["weights"], stored["pair_parameters"]) == ("steep", {"slope": 0.5})
    again = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "latent")
    assert again.vit.layers[0].mlp.fc1.pair is proxbit.quantizers.get_pair("steep", {"slope": 0.5})
    soft = logits(model.train(), pictures)
    assert torch.equal(logits(again.train(), pictures), soft)
    assert not torch.allclose(logits(proxbit.binarize(make(), config.replace(pair_parameters=None)), pictures), soft)
    packed = proxbit.pack(model.eval())
    packed.save_pretrained(tmp_path / "packed")
    done, results = process(WITH_PLUGIN, tmp_path / "packed", tmp_path / "latent")
    assert len(results) == 1, done.stderr
    assert torch.equal(results[0], logits(packed, pictures))
    assert done.returncode != 0
    assert "UnknownNameError: Unknown quantizer pair 'steep'" in done.stderr
    assert "proxbit.register_pair('steep', pair)" in done.stderr


def test_without_the_plugin(tmp_path, crops, process):
    """Dequantized models do not need it: from latent and packed, loaded, by the function and by the method of
    transformers. A packed one is never loaded as random weights: transformers meets sizes that do not fit.
    """
    pictures, folders = crops(4, 32), []
    model = proxbit.binarize(make())
    hard = logits(model, pictures)
    model.save_pretrained(tmp_path / "latent")
    proxbit.pack(model).save_pretrained(tmp_path / "packed")
    for state in ("latent", "packed"):
        for name, dequantize in DEQUANTIZE.items():
            loaded = dequantize(hf.AutoModelForImageClassification.from_pretrained(tmp_path / state))
            assert state_of(loaded) == "float"
            folders.append(tmp_path / f"float from {state} by {name}")
            loaded.save_pretrained(folders[-1])
            assert "quantization_config" not in json.loads((folders[-1] / "config.json").read_text())
    done, results = process(WITHOUT_PLUGIN, *folders, tmp_path / "packed")
    assert len(results) == 4, done.stderr
    assert done.returncode != 0
    assert "RuntimeError" in done.stderr
    assert "ignore_mismatched_sizes" in done.stderr
    for result in results:
        torch.testing.assert_close(result, hard, rtol=0, atol=1e-4)


def test_pipeline(tmp_path, photographs):
    """From a folder with a model and its image processor to the scores of a photograph."""
    model = proxbit.pack(proxbit.binarize(make(id2label={0: "temple", 1: "flower", 2: "neither"})))
    processor = hf.ViTImageProcessorPil(size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    classify = hf.pipeline("image-classification", model=str(tmp_path))
    assert isinstance(classify.model.vit.layers[0].mlp.fc1, PackedLinear)
    for photograph in photographs:
        picture = Image.fromarray(photograph)
        scores = {entry["label"]: entry["score"] for entry in classify(picture)}
        pictures = processor(picture, return_tensors="pt")["pixel_values"]
        expected = logits(model, pictures).softmax(-1)[0].tolist()
        assert scores == pytest.approx(dict(zip(("temple", "flower", "neither"), expected, strict=True)), abs=1e-5)


def test_the_file_is_as_large_as_its_bits(tmp_path):
    """Bytes after the header: the bits of every row in whole bytes, a scale a row, and the listed float remainder."""
    model = make()
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name}
    bits = sum(m.out_features * math.ceil(m.in_features / 8) for n, m in model.named_modules() if n in layers)
    scales = sum(module.out_features for name, module in model.named_modules() if name in layers)
    remainder = sum(p.numel() for name, p in model.named_parameters() if name.removesuffix(".weight") not in layers)
    proxbit.pack(proxbit.binarize(model)).save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    header = struct.unpack("<Q", content[:8])[0]
    assert len(layers) == 12
    assert len(content) - 8 - header == bits + 4 * scales + 4 * remainder


def test_a_packed_vit_base_is_19_times_smaller():
    """ViT-Base with the 1000 classes of its checkpoints; without data, on the meta device."""
    with torch.device("meta"):
        model = hf.ViTForImageClassification(hf.ViTConfig(num_labels=1000))

    def size():
        return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())

    before = size()
    assert 345e6 < before < 347e6
    proxbit.pack(proxbit.binarize(model))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 72
    assert before >= 19 * size()


def test_plain_modules(crops):
    """No transformers needed: linear and convolutional layers of any module, and its state dict."""
    layers = (nn.Conv2d(3, 12, 4, stride=4), nn.ReLU(), nn.Conv2d(12, 10, 3, padding="same"), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(640, 5), nn.Linear(5, 3)).eval()
    pictures = crops(2, 32)
    start = model(pictures).detach()
    config = proxbit.BinarizationConfig(include=["2", "4"])
    assert proxbit.binarize(model, config) is model
    assert (type(model[2]), type(model[4])) == (BinaryConv2d, BinaryLinear)
    hard = model(pictures).detach()
    assert (hard - start).abs().max() > 1e-3
    assert proxbit.pack(model) is model
    assert (type(model[2]), type(model[4])) == (PackedConv2d, PackedLinear)
    torch.testing.assert_close(model(pictures).detach(), hard, rtol=0, atol=1e-4)
    bits = {name: tensor.shape for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8}
    assert bits == {"2.weight": (10, 14), "4.weight": (5, 80)}
    assert proxbit.dequantize(model) is model
    assert (type(model[2]), type(model[4])) == (nn.Conv2d, nn.Linear)
    torch.testing.assert_close(model(pictures).detach(), hard, rtol=0, atol=1e-4)


class Wrapped(nn.Module):
    """A backbone of transformers, and a head that is not."""

    def __init__(self, attention):
        super().__init__()
        config = vit(initializer_range=0.3, attn_implementation=attention)
        self.backbone, self.neck = hf.ViTModel(config, add_pooling_layer=False), nn.Linear(36, 36)
        self.classes = nn.Linear(36, 3)

    def forward(self, pixel_values):
        return self.classes(self.neck(self.backbone(pixel_values).last_hidden_state))


@pytest.mark.parametrize(("pack", "attention"), [(False, "proxbit_binary"), (True, "sdpa"), (True, "proxbit_binary")])
def test_a_transformers_model_in_a_module_of_ones_own(pack, attention, tmp_path, crops):
    """It is told how it was binarized in the whole, whatever the overrides of the whole were."""
    model, pictures = Wrapped(attention).eval(), crops(2, 32)
    overrides = {
        "backbone.layers.*": {"activations": "int8", "residual": False},
        "backbone.layers.1.*": {"rprelu": True},
        "*.o_proj": {"activations": "float", "residual": True},
        "neck": {"activations": "int4"},
    }
    config = proxbit.BinarizationConfig(activations="sign", overrides=overrides, modules_to_not_convert=["classes"])
    proxbit.binarize(model, config)
    if pack:
        proxbit.pack(model)
    model.backbone.save_pretrained(tmp_path)
    again = hf.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False, attn_implementation=attention)
    assert torch.equal(again(pictures).last_hidden_state, model.backbone(pictures).last_hidden_state)
    assert again.state_dict().keys() == model.backbone.state_dict().keys()


def test_a_wrapped_model_is_float_again(tmp_path, crops):
    model, pictures = nn.DataParallel(make()), crops(2, 32)
    hard = logits(proxbit.binarize(model).module, pictures)
    proxbit.dequantize(proxbit.pack(model)).module.save_pretrained(tmp_path)
    again = hf.ViTForImageClassification.from_pretrained(tmp_path)
    assert state_of(again) == "float"
    torch.testing.assert_close(logits(again, pictures), hard, rtol=0, atol=1e-4)


def test_a_compiled_model_is_binarized_inside(crops):
    model, pictures = make(), crops(2, 32)
    plain = proxbit.binarize(copy.deepcopy(model))
    compiled = torch.compile(model, backend="eager")
    proxbit.binarize(compiled)
    assert torch.equal(logits(model, pictures), logits(plain, pictures))
    assert torch.equal(logits(compiled, pictures), logits(plain, pictures))
    assert model.config.quantization_config == plain.config.quantization_config


@pytest.mark.parametrize("kind", [hf.ViTForImageClassification, hf.ViTModel])
def test_models_of_one_configuration(kind, tmp_path):
    """What one is saved with is not what another one was binarized with."""
    shared = vit(attn_implementation="sdpa")
    models = {name: kind(shared) for name in ("bc", "bnn++", "parq")}
    for name, model in models.items():
        proxbit.binarize(model, proxbit.BinarizationConfig(weights=name))
    for name, model in models.items():
        proxbit.pack(model).save_pretrained(tmp_path / name)
        assert hf.AutoConfig.from_pretrained(tmp_path / name).quantization_config["weights"] == name
        model.set_attn_implementation("eager")
        assert model.base_model.layers[0].attention.config._attn_implementation == "eager"


def test_a_teacher_of_the_same_configuration_stays_float(tmp_path):
    for family in ("vit", "segformer"):
        model = FAMILIES[family]()
        teacher = type(model)(model.config)
        proxbit.binarize(model)
        teacher.save_pretrained(tmp_path / family)
        assert state_of(type(teacher).from_pretrained(tmp_path / family)) == "float"


def test_a_bare_layer_has_nothing_inside_to_binarize():
    with pytest.raises(PatternError, match="Nothing to binarize in Linear"):
        proxbit.binarize(nn.Linear(4, 4))
