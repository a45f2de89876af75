"""Downloads from the Hub of the tests, whole and damaged."""

import hashlib

import pytest
import torch
import transformers as hf

import proxbit
from hub_server import Fault, flip_a_bit, git_id
from proxbit.errors import CheckpointError
from proxbit.plugin.downloads import check_downloads
from tiny_models import vit

WEIGHTS = "model.safetensors"


def load(**changes):
    return hf.AutoModelForImageClassification.from_pretrained("me/tiny", **changes)


@pytest.fixture
def pushed(hub):
    """A packed model, and as `me/tiny` on the Hub."""
    model = proxbit.pack(proxbit.binarize(hf.ViTForImageClassification(vit())))
    model.push_to_hub("me/tiny")
    return model


def test_a_whole_download_is_loaded(hub, pushed):
    loaded = load().state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in pushed.state_dict().items())


def test_a_damaged_download_is_never_loaded_and_can_be_repaired(hub, pushed):
    """One bit of the weights. The client finds nothing wrong and keeps the file: refused from the cache too."""
    hub.faults = [Fault("GET", "/storage/", corrupt=flip_a_bit)]
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"^{WEIGHTS} was damaged on its way.*force_download=True"):
            load()
    assert hub.count("GET", "/storage/") == 1
    loaded = load(force_download=True).state_dict()
    assert torch.equal(loaded["vit.layers.1.mlp.fc1.weight"], pushed.state_dict()["vit.layers.1.mlp.fc1.weight"])
    load()


def test_a_damaged_shard_is_found_among_the_others(hub, pushed):
    pushed.push_to_hub("me/shards", max_shard_size="10KB")
    hub.faults = [Fault("GET", "/storage/", corrupt=flip_a_bit)]
    with pytest.raises(CheckpointError, match=r"^model-0000\d-of-0000\d.safetensors was damaged"):
        hf.AutoModelForImageClassification.from_pretrained("me/shards")


def test_a_damaged_configuration_is_never_loaded(hub, pushed):
    """It can still be read, and says something else."""
    hub.faults = [Fault("GET", "/config.json", corrupt=lambda data: data.replace(b"1e-12", b"2e-12"))]
    with pytest.raises(CheckpointError, match="^config.json was damaged"):
        load()


def test_an_interrupted_download_begins_again(hub, pushed):
    hub.faults = [Fault("GET", "/storage/", drop=1000)]
    load()
    assert hub.count("GET", "/storage/") == 2


def test_only_files_of_the_cache_are_compared(tmp_path):
    """A user's own folder, and links that mean something else."""
    data = b"some bytes"
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name, announced in {
        "large.safetensors": hashlib.sha256(data).hexdigest(),
        "small.json": git_id("blob", data),
    }.items():
        (blobs / announced).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{announced}")
    (snapshot / "own.safetensors").write_bytes(data)
    (tmp_path / "elsewhere").write_bytes(data)
    (snapshot / "linked.safetensors").symlink_to("../../elsewhere")
    files = sorted(snapshot.glob("*.safetensors"))
    check_downloads(files)
    for name in ("elsewhere", "snapshots/1/own.safetensors"):
        (tmp_path / name).write_bytes(b"SOME bytes")
    check_downloads(files)
    (blobs / git_id("blob", data)).write_bytes(b"SOME bytes")
    with pytest.raises(CheckpointError, match="^small.json was damaged"):
        check_downloads(files)


def test_a_blob_may_be_a_link_into_a_store_with_other_names(tmp_path):
    data = b"some bytes"
    name = hashlib.sha256(data).hexdigest()
    for folder in ("blobs", "store/blobs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "store/blobs" / ("0" * 64)).write_bytes(data)
    (tmp_path / "blobs" / name).symlink_to(f"../store/blobs/{'0' * 64}")
    (tmp_path / "snapshot").mkdir()
    file = tmp_path / "snapshot" / WEIGHTS
    file.symlink_to(f"../blobs/{name}")
    check_downloads([file])
