"""A packed model in folders, in one file and in three."""

import shutil
from pathlib import Path

import pytest
from transformers import ViTForImageClassification

import proxbit
from tiny_models import vit


@pytest.fixture(scope="package")
def saved(tmp_path_factory):
    """The same packed model as `save_pretrained` writes it, whole and in three pieces."""
    folder = tmp_path_factory.mktemp("saved")
    model = proxbit.pack(proxbit.binarize(ViTForImageClassification(vit())))
    model.save_pretrained(folder / "plain")
    model.save_pretrained(folder / "shards", max_shard_size="10KB")
    assert len(list(folder.glob("shards/model-*.safetensors"))) == 3
    return folder


def copied(name):
    @pytest.fixture
    def folder(saved, tmp_path):
        return Path(shutil.copytree(saved / name, tmp_path / name))

    return folder


plain, shards = copied("plain"), copied("shards")
