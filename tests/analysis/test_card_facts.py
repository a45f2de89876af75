"""What a card says of a model, counted another way."""

import hashlib
import subprocess

import pytest
import torch
import transformers as hf
from torch import nn

import proxbit
from proxbit.analysis.card_facts import (
    FORMATS,
    activation_bits,
    checkpoint_sha,
    file_facts,
    hub_name,
    model_facts,
    peak_activation_bytes,
    weight_bits,
)
from proxbit.checkpoint.weights import save_weights
from proxbit.nn import ACTIVATIONS, PackedLinear
from tiny_models import FAMILIES, LABELS, SIDE, vit

D, M, LAYERS, TOKENS = 36, 50, 2, (SIDE // 8) ** 2 + 1
BINARIZED = LAYERS * (4 * D * D + 2 * D * M)
ROWS = LAYERS * (5 * D + M)


def make(state, **config):
    model = hf.ViTForImageClassification(vit())
    if state == "float":
        return model
    proxbit.binarize(model, proxbit.BinarizationConfig(**config))
    return proxbit.pack(model) if state == "packed" else model


def parameters():
    return sum(parameter.numel() for parameter in make("float").parameters())


def test_every_format_of_activations_is_described():
    assert set(FORMATS) == set(ACTIVATIONS) - {"float"}


@pytest.mark.parametrize("state", ["float", "latent", "packed"])
def test_sizes(state):
    """By hand: bits of a row fill whole bytes, each row has a scale."""
    facts = model_facts(make(state))
    others = parameters() - BINARIZED
    bits = LAYERS * 8 * (5 * D * 5 + M * 5) if state == "packed" else 32 * BINARIZED
    bits += 32 * (others + (ROWS if state == "packed" else 0))
    if state == "packed":  # fc2 has D rows of M columns, of 7 bytes
        bits += LAYERS * 8 * D * 2
    assert (facts["total_parameters"], facts["total_bits"]) == (parameters(), bits)
    assert facts["avg_weight_bits"] == pytest.approx(bits / parameters())
    assert facts["binary_parameters"] == (0 if state == "float" else BINARIZED)
    assert facts["float_parameters"] == parameters() - facts["binary_parameters"]
    assert facts["float32_tensor_bytes"] == 4 * parameters()
    assert facts["tensor_bytes"] == sum(t.numel() * t.element_size() for t in make(state).state_dict().values())


def test_weights_of_the_three_states():
    float_, latent, packed = (model_facts(make(state)) for state in ("float", "latent", "packed"))
    assert [facts["weight_bits"] for facts in (float_, latent, packed)] == [32, 1, 1]
    assert [facts["weight_levels"] for facts in (float_, latent, packed)] == [[], [-1, 1], [-1, 1]]
    assert [facts["weight_quantizer"] for facts in (float_, latent, packed)] == ["none", "bnn++", "bnn++"]
    assert [facts["scale_count"] for facts in (float_, latent, packed)] == [0, ROWS, ROWS]
    whole = nn.Sequential(make("packed"), nn.Linear(3, 3))
    assert model_facts(whole)["weight_quantizer"] == "bnn++"  # of a part, in a whole that is no model of transformers
    assert [f["simulated_or_kernel"] for f in (float_, latent, packed)] == ["float", "simulated", "kernel"]
    same = ("weight_symmetry", "weight_granularity", "scale_dtype", "bias_bits", "mixed_precision_policy")
    assert {name: latent[name] for name in same} == {name: packed[name] for name in same}
    assert packed["mixed_precision_policy"] == {"W32A32": 2, "W1A32": 6 * LAYERS}
    assert (packed["first_layer_bits"], packed["last_layer_bits"]) == (32, 32)


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_choices_of_the_weights(state):
    offset = model_facts(make(state, weights="adabin"))
    assert (offset["weight_symmetry"], offset["scale_count"]) == ("one offset a row", 2 * ROWS)
    whole = model_facts(make(state, normalize="tensor", scale="fixed"))
    assert whole["weight_granularity"] == "tensor"
    assert model_facts(make(state))["weight_granularity"] == "row"
    last = model_facts(make(state, include=["classifier"]))
    assert last["last_layer_bits"] == 1


def test_more_than_two_levels():
    facts = model_facts(make("latent", weights="pc", pair_parameters={"levels": [-1, 0, 1]}))
    assert facts["weight_bits"] == pytest.approx(1.58496, rel=1e-5) and facts["weight_levels"] == [-1, 0, 1]
    assert "W1.58A32" in facts["mixed_precision_policy"]


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_choices_of_the_activations(state):
    facts = model_facts(make(state, activations="sign", overrides={"vit.layers.0": {"activations": "int8"}}))
    assert facts["activation_bits"] == [1, 8]
    assert facts["static_or_dynamic"] == ["dynamic", "static"]
    assert facts["activation_granularity"] == ["token", "scale a layer, threshold a channel"]
    assert facts["mixed_precision_policy"] == {"W32A32": 2, "W1A8": 6, "W1A1": 6}
    assert facts["calibration_samples"] is None and len(facts["calibration_observer"]) == 2
    int8 = model_facts(make(state, activations="int8"))
    assert (int8["calibration_observer"], int8["calibration_samples"]) == ([], 0)
    narrow = model_facts(make(state, activations="int8", accumulator_bits=12))
    assert (narrow["accumulator_bits"], int8["accumulator_bits"]) == ([12], [32])


def test_attention_and_precision():
    model = make("packed")
    model.set_attn_implementation("proxbit_int8")
    assert model_facts(model)["attention_prob_bits"] == 8
    assert model_facts(make("packed"))["attention_prob_bits"] == 32
    assert model_facts(FAMILIES["resnet"]())["attention_prob_bits"] == 0
    assert model_facts(FAMILIES["levit"]())["attention_prob_bits"] != 0
    facts = model_facts(make("float").bfloat16())
    assert (facts["skip_precision"], facts["softmax_layernorm_precision"]) == ("bfloat16", "bfloat16")
    assert (facts["weight_bits"], facts["attention_prob_bits"], facts["avg_weight_bits"]) == (16, 16, 16)


def test_fusing_is_told():
    assert model_facts(make("packed"))["norm_folding"] is False
    assert model_facts(proxbit.fuse(make("packed")))["norm_folding"] is True


def test_computation():
    """The largest output of a part is that of fc1."""
    facts = model_facts(make("packed"))
    linear = LAYERS * TOKENS * (4 * D * D + 2 * D * M)
    rest = LAYERS * 2 * TOKENS * TOKENS * D + (TOKENS - 1) * D * 3 * 8 * 8 + D * LABELS
    assert (facts["binary_ops"], facts["float_ops"]) == (linear, rest)
    assert facts["peak_activation_bytes"] == 4 * TOKENS * M


def test_what_takes_no_picture_has_unknown_costs():
    model = nn.Sequential(nn.Linear(8, 8))
    facts = model_facts(model.train())
    assert peak_activation_bytes(model) is None and model.training
    assert facts["binary_ops"] is None and facts["float_ops"] is None
    assert facts["total_parameters"] == 72 and facts["softmax_layernorm_precision"] is None


def test_bits_of_layers():
    layer = PackedLinear(8, 4, activations="sign")
    assert (weight_bits(layer), activation_bits(layer, layer)) == (1, 1)
    half = nn.Linear(8, 4, dtype=torch.float16)
    assert (weight_bits(half), activation_bits(half, half)) == (16, 16)


def test_files(tmp_path):
    """Bytes as the system counts them, checksums as sha256sum prints them."""
    make("packed").save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    facts = file_facts(files)
    assert len(files) > 1 and list(facts["files"]) == [file.name for file in files]
    assert facts["model_bytes"] == sum(len(file.read_bytes()) for file in files)
    assert facts["model_bytes"] - facts["header_bytes"] == model_facts(make("packed"))["tensor_bytes"]
    listing = subprocess.run(["sha256sum", *facts["files"]], cwd=tmp_path, capture_output=True, check=True).stdout
    assert facts["checkpoint_sha"] == checkpoint_sha(facts["files"]) == hashlib.sha256(listing).hexdigest()


def test_the_name_on_the_hub(tmp_path, monkeypatch):
    model = make("float")
    assert hub_name(model) is None and hub_name(nn.Linear(2, 2)) is None
    model.config.name_or_path = "google/vit-base-patch16-224"
    assert hub_name(model) == "google/vit-base-patch16-224"
    save_weights(model, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    for folder in (str(tmp_path / "out"), "out"):
        assert hub_name(hf.ViTForImageClassification.from_pretrained(folder)) is None
