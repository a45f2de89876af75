"""Packed checkpoints are loaded onto devices, into memory and onto disk, as accelerate places them."""

import pytest
import torch
from transformers import AutoModelForImageClassification

import proxbit
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
