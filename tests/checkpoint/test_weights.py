"""Weights of checkpoints: every one arrives, and those of another model are refused."""

import shutil

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
)
from transformers.core_model_loading import Chunk, WeightConverter

import proxbit
from proxbit.checkpoint.files import is_model_folder, tensor_headers
from proxbit.checkpoint.weights import as_saved
from proxbit.errors import CheckpointError, ConfigError
from proxbit.plugin.loading import load_weights
from tiny_models import vit


def make(seed, latent):
    torch.manual_seed(seed)
    model = ViTForImageClassification(vit())
    return proxbit.binarize(model) if latent else model


def equal(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("latent", [False, True], ids=["float", "latent"])
def test_every_weight_is_loaded(tmp_path, latent):
    saved, model = make(1, latent), make(2, latent)
    saved.save_pretrained(tmp_path)
    parameters = dict(model.named_parameters())
    load_weights(model, tmp_path)
    assert equal(model, saved)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_names_are_those_of_the_file(tmp_path, device):
    model = make(0, True)
    model.save_pretrained(tmp_path)
    tensors = {name: tensor.to(device) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in as_saved(model, tensors).items()}
    file = tensor_headers(tmp_path / "model.safetensors")
    assert found == {name: shape for name, (_, shape) in file.items()}
    assert found.keys() != tensors.keys() == as_saved(nn.Linear(1, 1), tensors).keys()


class Joined(ViTForImageClassification):
    """Its queries, keys and values are one tensor in the file, rows upon rows, as in many a checkpoint."""

    _weight_conversions = (
        WeightConverter("qkv.weight", [f"{each}_proj.weight" for each in "qkv"], operations=[Chunk(dim=0)]),
    )


def test_layers_that_are_stored_as_one_are_converted_as_one(tmp_path):
    model = Joined(vit())
    before = {name: type(module) for name, module in model.named_modules()}
    config = proxbit.BinarizationConfig(modules_to_not_convert=["vit.layers.1.attention.k_proj"])
    message = r"layers\.1\.attention\.q_proj\.weight would be of 1 bit and .*\.1\.attention\.k_proj\.weight not"
    for wrapped in (model, nn.Sequential(model)):
        given = config if wrapped is model else config.replace(modules_to_not_convert=["0.vit.layers.1.*.k_proj"])
        with pytest.raises(ConfigError, match=message):
            proxbit.binarize(wrapped, given)
        assert {name: type(module) for name, module in model.named_modules()} == before
    make(0, False).save_pretrained(tmp_path / "float")
    with pytest.raises(ConfigError, match=message):
        Joined.from_pretrained(tmp_path / "float", quantization_config=config)
    every = config.replace(modules_to_not_convert=["vit.layers.1.attention.?_proj"])
    proxbit.pack(proxbit.binarize(model, every)).save_pretrained(tmp_path / "packed")
    written = [shape for name, (_, shape) in tensor_headers(tmp_path / "packed" / "model.safetensors").items()]
    assert (3 * 36, 5) in written and (3 * 36, 36) in written


class Wider(ViTForImageClassification):
    """Made with more than its configuration."""

    def __init__(self, config, width):
        super().__init__(config)
        self.extra = nn.Linear(3, width)


def own_head(model):
    model.classifier = nn.Sequential(nn.LayerNorm(36), nn.Linear(36, 3))
    return model


def one_block(model):
    model.vit.layers = model.vit.layers[:1]
    return model


UNDESCRIBED = {
    "own head": lambda: own_head(make(0, False)),
    "one block": lambda: one_block(make(0, False)),
    "more arguments": lambda: Wider(vit(), 4),
}


@pytest.mark.parametrize("kind", UNDESCRIBED)
def test_weights_of_models_that_no_configuration_describes(tmp_path, kind):
    saved, model = (proxbit.binarize(UNDESCRIBED[kind]()) for _ in range(2))
    for parameter in saved.parameters():
        nn.init.normal_(parameter)
    saved.save_pretrained(tmp_path)
    assert not equal(model, saved)
    load_weights(model, tmp_path)
    assert equal(model, saved)


def test_weights_of_several_files_and_of_another_dtype(tmp_path):
    saved, model = make(1, True), make(2, True).double()
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    load_weights(model, tmp_path)
    assert equal(model, saved.double())


def test_files_that_the_checkpoint_does_not_name_are_not_read(tmp_path):
    saved, other, model = (make(seed, True) for seed in range(3))
    other.save_pretrained(tmp_path / "other")
    saved.save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path / "saved/model_of_before.safetensors")
    load_weights(model, tmp_path / "saved")
    assert equal(model, saved)


def test_tied_weights_and_weights_that_are_stored_in_another_form(tmp_path):
    """Of tied weights the file has one; the experts of Mixtral are one tensor in memory, and many in the file."""
    sizes = dict(vocab_size=32, bos_token_id=0, eos_token_id=0)
    experts = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_local_experts=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    for kind, config in {
        GPT2LMHeadModel: GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, **sizes),
        MixtralForCausalLM: MixtralConfig(**experts, **heads, **sizes),
    }.items():
        saved, model = kind(config), kind(config)
        saved.save_pretrained(tmp_path / kind.__name__)
        assert not equal(model, saved)
        load_weights(model, tmp_path / kind.__name__)
        assert equal(model, saved)
        assert proxbit.summary(model).file_bytes == (tmp_path / kind.__name__ / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("saved", "model", "message"),
    [
        (make, lambda *_: one_block(make(0, False)), r"\.layer\.1\..*, \.\.\.: not in the model\)"),
        (lambda *_: one_block(make(0, False)), make, r"\(vit\.layers\.1\..*, \.\.\.: missing\)"),
        (make, lambda *_: own_head(make(0, False)), r"\(classifier\.0\.bias, .* missing; classifier\.bias, .* not in"),
        (make, lambda *_: ViTForImageClassification(vit(num_labels=5)), r"classifier\.weight: of another shape"),
        (lambda *_: proxbit.pack(make(0, True)), make, r"weight_scale, \.\.\.: not in the model; .* of another shape"),
    ],
    ids=["more blocks", "fewer blocks", "another head", "other labels", "packed"],
)
def test_weights_of_another_model_are_refused(tmp_path, saved, model, message):
    saved(0, False).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"not those of this model .*{message}"):
        load_weights(model(0, False), tmp_path)


def test_weights_that_are_cut_short_are_refused(tmp_path):
    make(0, True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        load_weights(make(0, True), tmp_path)


def test_the_trainer_of_transformers_still_needs_it(tmp_path):
    """When this fails, transformers has mended its Trainer, and `load_weights` can go."""
    saved, model = make(1, False), make(2, False)
    saved.save_pretrained(tmp_path)
    args = TrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True)
    Trainer(model=model, args=args)._load_from_checkpoint(str(tmp_path))
    assert torch.equal(model.classifier.weight, saved.classifier.weight)
    assert not equal(model, saved)


def test_model_folders(tmp_path):
    assert not is_model_folder(tmp_path)
    make(1, False).save_pretrained(tmp_path)
    assert is_model_folder(tmp_path) and is_model_folder(str(tmp_path))
    (tmp_path / "config.json").unlink()
    assert not is_model_folder(tmp_path)
