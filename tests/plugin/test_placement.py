"""Packed checkpoints are loaded onto devices, into memory and onto disk, as accelerate places them."""

import pytest
import torch
from transformers import AutoModelForImageClassification

import proxbit
from proxbit.errors import ConfigError
from proxbit.plugin.placement import check_trainable_places
from tiny_models import FAMILIES, SIDE

BLOCKS = {"vit.embeddings": "cpu", "vit.layers.0": "cpu", "vit.layernorm": "cpu", "classifier": "cpu"}


@pytest.mark.parametrize("places", ["auto", BLOCKS | {"vit.layers.1": "disk"}], ids=["auto", "a block on disk"])
def test_answers_stay_the_same(tmp_path, crops, places):
    model = proxbit.pack(proxbit.binarize(FAMILIES["vit"]())).eval()
    model.save_pretrained(tmp_path / "packed")
    pictures = crops(2, SIDE)
    loaded = AutoModelForImageClassification.from_pretrained(
        tmp_path / "packed", device_map=places, offload_folder=tmp_path / "disk"
    )
    on_disk = [name for name, value in loaded.state_dict().items() if value.is_meta]
    assert all(name.startswith("vit.layers.1.") for name in on_disk) and bool(on_disk) == (places != "auto")
    with torch.no_grad():
        assert torch.equal(loaded(pictures).logits, model(pictures).logits)


@pytest.mark.parametrize(
    ("places", "kind"),
    [({"": "disk"}, "float"), (BLOCKS | {"vit.layers.1": "disk"}, "latent"), ("meta", "latent")],
    ids=["all", "a block", "meta"],
)
def test_latents_cannot_lie_where_they_are_not_trained(tmp_path, places, kind):
    model = FAMILIES["vit"]()
    options = {"quantization_config": proxbit.BinarizationConfig()} if kind == "float" else {}
    (model if kind == "float" else proxbit.binarize(model)).save_pretrained(tmp_path / kind)
    with pytest.raises(ConfigError, match="latent weights are trained, .* Leave out device_map"):
        AutoModelForImageClassification.from_pretrained(
            tmp_path / kind, device_map=places, offload_folder=tmp_path / "disk", **options
        )
    assert not (tmp_path / "disk").exists()


def test_other_places_do():
    for places in (None, "auto", "cpu", 0, torch.device("cpu"), {"": "cpu", "vit": 0}):
        check_trainable_places(places)
