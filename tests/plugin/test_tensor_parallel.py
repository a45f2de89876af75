"""`tp_plan` in two processes: what it may split, and what it may not."""

import pytest
import torch
from transformers import ViTForImageClassification

import proxbit
from distributed_runs import make
from proxbit.errors import ConfigError
from tensor_parallel_runs import answers, message
from tiny_models import SIDE

pytestmark = pytest.mark.xdist_group("processes")

MLP = {"vit.layers.*.mlp.fc1": "colwise", "vit.layers.*.mlp.fc2": "rowwise"}


@pytest.fixture(params=["latent", "packed"])
def folder(request, tmp_path):
    model = make()
    if request.param == "packed":
        proxbit.pack(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def test_float_layers_are_split(folder, processes, crops):
    pictures = crops(4, SIDE)
    expected = ViTForImageClassification.from_pretrained(folder)(pictures).logits
    for found, kind in processes(answers, folder, {"classifier": "colwise_gather_output"}, pictures):
        assert kind == "DTensor"
        torch.testing.assert_close(found, expected)


def test_other_layers_are_refused(folder, processes):
    """All four of them, before anything is computed from halves of rows."""
    for found in processes(message, folder, MLP):
        assert found.startswith(f"{ConfigError.__name__}: The tp_plan splits vit.layers.0.mlp.fc1 and 3 more")


def test_a_model_without_a_plan_says_so(folder, processes):
    for found in processes(message, folder, "auto"):
        assert "`ViTForImageClassification` has no `tp_plan`" in found
