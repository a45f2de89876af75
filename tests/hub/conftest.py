"""Packed models in folders, for whoever uploads them; and a client that does not wait."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import ViTForImageClassification

import proxbit
from proxbit.hub.release import write_release
from tiny_models import vit


@pytest.fixture(scope="package")
def saved(tmp_path_factory):
    """The same packed model as a release, as `save_pretrained` writes it, and in three pieces."""
    folder = tmp_path_factory.mktemp("saved")
    model = proxbit.pack(proxbit.binarize(ViTForImageClassification(vit())))
    write_release(model, folder / "release", run={"license": "mit"})
    model.save_pretrained(folder / "plain")
    model.save_pretrained(folder / "shards", max_shard_size="10KB")
    assert len(list(folder.glob("shards/model-*.safetensors"))) == 3
    return folder


def copied(name):
    @pytest.fixture
    def folder(saved, tmp_path):
        return Path(shutil.copytree(saved / name, tmp_path / name))

    return folder


release, plain, shards = copied("release"), copied("plain"), copied("shards")


@pytest.fixture
def waits(monkeypatch):
    """How many seconds the client waited before it tried again: it does not really."""
    waited = []
    clock = SimpleNamespace(**vars(time) | {"sleep": waited.append})
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    return waited
