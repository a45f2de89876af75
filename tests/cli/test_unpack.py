"""`proxbit unpack`: what it writes needs no plug-in."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from typer.testing import CliRunner

import proxbit
from picture_folders import tiny_classifier
from proxbit.cli.app import app
from proxbit.cli.checkpoints import load_model
from proxbit.errors import ModelStateError


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_plain_layers_with_the_same_output(tmp_path, crops, state):
    model = proxbit.binarize(load_model(str(tiny_classifier(tmp_path / "float"))))
    if state == "packed":
        proxbit.pack(model)
    model.eval().save_pretrained(tmp_path / state)
    done = CliRunner().invoke(app, ["unpack", str(tmp_path / state), str(tmp_path / "plain")])
    assert done.exit_code == 0, done.exception
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(tensor.is_floating_point() for tensor in stored.values())
    plain = hf.ViTForImageClassification.from_pretrained(tmp_path / "plain").eval()
    assert {type(module) for module in plain.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}
    with torch.no_grad():
        torch.testing.assert_close(plain(crops(2, 32)).logits, model(crops(2, 32)).logits)


def test_a_float_model_is_refused(tmp_path):
    folder = tiny_classifier(tmp_path / "float")
    done = CliRunner().invoke(app, ["unpack", str(folder), str(tmp_path / "plain")])
    assert isinstance(done.exception, ModelStateError)
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"activations": "sign"}, r"sign activations \(\d+ layers\)"),
        ({"activations": "int8", "accumulator_bits": 8}, "narrow accumulators"),
        ({"rprelu": True}, "RPReLU"),
    ],
)
def test_what_no_float_model_computes_is_refused(tmp_path, changes, what):
    model = proxbit.binarize(
        load_model(str(tiny_classifier(tmp_path / "float"))), proxbit.BinarizationConfig(**changes)
    )
    model.save_pretrained(tmp_path / "latent")
    done = CliRunner().invoke(app, ["unpack", str(tmp_path / "latent"), str(tmp_path / "plain")])
    with pytest.raises(ModelStateError, match=f"{what}.*no float model computes the same"):
        raise done.exception
    assert not (tmp_path / "plain").exists()
