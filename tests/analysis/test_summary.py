"""The table of a model: every number recomputed another way."""

import re

import pytest
import torch
from torch import nn

import proxbit
from proxbit.kernels import native
from tiny_models import FAMILIES, SIDE

D, M, TOKENS, LAYERS, HEADS = 36, 50, (SIDE // 8) ** 2 + 1, 2, 4


@pytest.fixture
def model():
    return FAMILIES["vit"]()


def test_float_model(model):
    table = proxbit.summary(model)
    parameters = sum(p.numel() for p in model.parameters())
    assert table.state == "float"
    assert (table.binary_parameters, table.float_parameters) == (0, parameters)
    assert table.file_bytes - table.header_bytes == 4 * parameters


def test_macs_by_hand(model):
    """Linear layers, the patch embedding, the head, and both products of the attention."""
    linear = LAYERS * TOKENS * (4 * D * D + 2 * D * M)
    attention = LAYERS * 2 * TOKENS * TOKENS * D
    patches = (TOKENS - 1) * D * 3 * 8 * 8
    proxbit.pack(proxbit.binarize(model))
    table = proxbit.summary(model)
    assert table.binary_macs == linear
    assert table.total_macs == linear + attention + patches + D * model.config.num_labels


def test_states_bits_and_kernels(model):
    proxbit.binarize(model)
    latent = {layer.name: layer for layer in proxbit.summary(model).layers}
    assert latent["vit.layers.0-1.mlp.fc1"].state == "latent"
    assert latent["vit.layers.0-1.mlp.fc1"].kernel == "simulated"
    assert latent["vit.layers.0-1.mlp.fc1"].bits == 32
    proxbit.pack(model)
    packed = {layer.name: layer for layer in proxbit.summary(model).layers}
    fc1, kernel = packed["vit.layers.0-1.mlp.fc1"], native().name if native() else "reference"
    assert (fc1.state, fc1.bits, fc1.kernel, fc1.count) == ("packed", 1, kernel, LAYERS)
    assert fc1.binary_parameters == LAYERS * D * M
    assert fc1.bytes == LAYERS * (M * 5 + 4 * M + 4 * M)
    assert packed["classifier"].state == "float"


def test_offsets_take_a_number_a_row(model):
    """One more than the scales, beside bits and biases; as float32 a layer is as large as ever."""
    proxbit.pack(proxbit.binarize(model, proxbit.BinarizationConfig(weights="adabin")))
    fc1 = {layer.name: layer for layer in proxbit.summary(model).layers}["vit.layers.0-1.mlp.fc1"]
    assert fc1.bytes == LAYERS * (M * 5 + 3 * 4 * M)
    assert fc1.binary_parameters == LAYERS * D * M


@pytest.mark.parametrize("pair", ["bnn++", "adabin"])
def test_a_latent_model_tells_its_size_once_packed(model, pair):
    before = proxbit.summary(proxbit.binarize(model, proxbit.BinarizationConfig(weights=pair)))
    after = proxbit.summary(proxbit.pack(model))
    tensors = [table.packed_bytes - table.packed_header_bytes for table in (before, after)]
    assert tensors[0] == tensors[1] == after.file_bytes - after.header_bytes
    assert before.header_bytes + 50 * LAYERS * 6 < before.packed_header_bytes == after.header_bytes
    assert before.float32_bytes - before.header_bytes == after.float32_bytes - after.header_bytes


def saved_bytes(model, folder):
    model.save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


# Of them, those whose checkpoints have other names than their modules, weights that are stored as one, or convolutions.
STORED = ["vit", "swin", "dinov2", "dinov3", "clip", "siglip", "convnext", "mobilevit", "detr", "dpt depth"]


@pytest.mark.parametrize("family", STORED)
def test_file_sizes_are_foretold_to_the_byte(family, tmp_path):
    """Of the latent model, and of the packed one before and after; transformers writes other names than it reads."""
    model = proxbit.binarize(FAMILIES[family]())
    latent = proxbit.summary(model, count_macs=False)
    assert latent.file_bytes == saved_bytes(model, tmp_path / "latent")
    packed = proxbit.summary(proxbit.pack(model), count_macs=False)
    assert latent.packed_bytes == packed.file_bytes == saved_bytes(model, tmp_path / "packed")


@pytest.mark.parametrize(
    ("pair", "recipe", "dtype"), [("adabin", "w1a8", torch.bfloat16), ("bnn++", "w1a1", torch.float16)]
)
def test_file_sizes_are_foretold_with_what_is_learned(model, pair, recipe, dtype, tmp_path):
    model.to(dtype)
    assert proxbit.summary(model).file_bytes == saved_bytes(model, tmp_path / "float")
    proxbit.binarize(model, proxbit.get_recipe(recipe).binarization(weights=pair))
    foretold = proxbit.summary(model, count_macs=False)
    assert foretold.file_bytes == saved_bytes(model, tmp_path / "latent")
    assert foretold.packed_bytes == saved_bytes(proxbit.pack(model), tmp_path / "packed")


def test_text(model):
    text = str(proxbit.summary(proxbit.pack(proxbit.binarize(model))))
    assert max(map(len, text.splitlines())) <= 120
    for word in (
        "1-bit MACs",
        "kernel",
        native().name if native() else "reference",
        "smaller than fp32",
        "attention.q_proj ×2",
        "attention included",
    ):
        assert word in text
    ratio = proxbit.summary(model).compression_ratio
    assert f"{ratio:.1f}x" in text


def test_shared_tensors_count_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    table = proxbit.summary(model, inputs={"input": torch.zeros(1, 8)})
    assert table.float_parameters == 64 + 16
    assert table.total_macs == 128


def test_training_mode_is_kept(model):
    model.train()
    proxbit.summary(model)
    assert model.training


def test_what_cannot_run_is_said():
    table = proxbit.summary(nn.Sequential(nn.Linear(8, 8)))
    assert table.total_macs is None and table.binary_macs is None
    assert "not counted" in str(table) and "inputs=" in str(table)


def test_numbers_in_names_fold_only_between_dots():
    model = nn.ModuleDict({"norm_1": nn.LayerNorm(4), "norm_2": nn.LayerNorm(4)})
    names = [layer.name for layer in proxbit.summary(model).layers]
    assert names == ["norm_1", "norm_2"]
    assert not re.search(r"norm_1-2", str(proxbit.summary(model)))


def test_without_running_the_model():
    """Everything but the multiply-accumulates is the same, and the model is not called."""
    model = proxbit.binarize(FAMILIES["vit"](), proxbit.BinarizationConfig())
    full = proxbit.summary(model)
    model.forward = None
    short = proxbit.summary(model, count_macs=False)
    assert (short.total_macs, short.binary_macs) == (None, None)
    assert (short.file_bytes, short.packed_bytes) == (full.file_bytes, full.packed_bytes)
    assert "not counted: not asked for" in str(short)


def test_a_model_whose_modules_are_given_a_parameter():
    class Queries(nn.Module):
        """As SAM, Perceiver and Deformable DETR have them."""

        def __init__(self):
            super().__init__()
            self.queries = nn.Parameter(torch.randn(4, 8))
            self.inner, self.frozen = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)

        def forward(self, pixel_values):
            return self.frozen(self.inner(self.queries)) + pixel_values.mean()

    model = Queries()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert proxbit.summary(model).total_macs == 2 * 4 * 8 * 8
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
