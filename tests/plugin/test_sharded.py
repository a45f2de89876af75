"""A packed copy of a latent model: that of `pack`, and the model stays as it is."""

import copy
import os
import subprocess
import sys

import pytest
import torch

import proxbit
from proxbit.errors import LatentError, ModelStateError
from proxbit.nn import latent_layers
from proxbit.patching import state_of
from proxbit.plugin.sharded import is_sharded, packed_copy
from tiny_models import FAMILIES, SIDE


@pytest.mark.parametrize(
    ("family", "center"), [("vit", "restore"), ("swin", "none"), ("convnext", "restore"), ("dinov3", "none")]
)
def test_it_is_what_pack_makes(family, center, crops):
    """With the buffers that no checkpoint holds, such as positions."""
    model = proxbit.binarize(FAMILIES[family](), proxbit.BinarizationConfig(center=center)).eval()
    before = copy.deepcopy(model.state_dict())
    made = packed_copy(model)
    packed = proxbit.pack(copy.deepcopy(model))
    assert state_of(model) == "latent" and not is_sharded(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    expected = packed.state_dict()
    assert expected.keys() == made.state_dict().keys()
    assert all(torch.equal(expected[name], value) for name, value in made.state_dict().items())
    pictures = crops(2, SIDE)
    with torch.inference_mode():
        torch.testing.assert_close(made(pictures)[0], packed(pictures)[0], rtol=0, atol=0)
    assert made.config.quantization_config.state == "packed" and model.config.quantization_config.state == "latent"


def test_nothing_is_printed_where_deepspeed_is_installed(tmp_path):
    """It prints when it is imported, and what a command prints may be JSON."""
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("print('hello')")
    (tmp_path / "deepspeed-0.19.8.dist-info").mkdir()
    (tmp_path / "deepspeed-0.19.8.dist-info" / "METADATA").write_text("Name: deepspeed\nVersion: 0.19.8\n")
    where = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code = (
        "from transformers.integrations import is_deepspeed_available as a; import proxbit.plugin.sharded; print(a())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": where}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"


def test_it_takes_a_latent_model():
    with pytest.raises(ModelStateError, match="packed_copy takes a latent model, this one is float"):
        packed_copy(FAMILIES["vit"]())


def test_it_takes_a_model_that_its_configuration_describes():
    with pytest.raises(ModelStateError, match="a model of transformers, not a Sequential"):
        packed_copy(proxbit.binarize(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))))
    model = proxbit.binarize(FAMILIES["vit"]())
    model.classifier = torch.nn.Sequential(model.classifier)
    with pytest.raises(ModelStateError, match=r"^classifier\.0: this model and a ViTForImageClassification made from"):
        packed_copy(model)


def test_a_broken_row_is_named():
    model = proxbit.binarize(FAMILIES["vit"]())
    name, layer = next(iter(latent_layers(model)))
    layer.weight.data[3] = float("nan")
    with pytest.raises(LatentError, match=rf"{name}.weight: 1 of 36 rows hold NaN or infinite values \(first: row 3\)"):
        packed_copy(model)
