"""Weight files and their checksums: a release changed in one bit is refused, from a folder and from the Hub."""

import hashlib
import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors import safe_open

import proxbit
from proxbit.checkpoint.files import CARD_NAME, check_files, sha256, weight_files
from proxbit.checkpoint.weights import save_weights
from proxbit.errors import CheckpointError
from proxbit.hub.release import write_release
from proxbit.plugin import downloads
from tiny_models import vit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LAYER = "vit.encoder.layer.1.intermediate.dense.weight"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    model = hf.ViTForImageClassification(vit())
    return write_release(proxbit.pack(proxbit.binarize(model)), tmp_path_factory.mktemp("releases") / "vit")


@pytest.fixture
def folder(release, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(release, tmp_path / "vit")


@pytest.fixture
def cache(release, tmp_path):
    """The release in a cache of the Hub, as me/vit; returns the cache and the snapshot's folder."""
    repository = tmp_path / "cache" / "models--me--vit"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(release, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "cache", snapshot


def load(name, **arguments):
    return hf.AutoModelForImageClassification.from_pretrained(name, **arguments)


def flip_bit(file, key, byte=0):
    """Flip the lowest bit of one byte of a tensor, in the file."""
    with safe_open(file, framework="pt") as tensors:
        wanted = tensors.get_tensor(key).flatten().view(torch.uint8)
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    begin = start + header[key]["data_offsets"][0]
    assert content[begin + byte] == wanted[byte]
    content[begin + byte] ^= 1
    file.write_bytes(content)


def test_a_whole_file_is_hashed_in_pieces(tmp_path):
    content = bytes(range(256)) * 4096
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_weight_files_are_those_of_the_model(tmp_path):
    for name in ("model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors", "other.safetensors"):
        (tmp_path / name).touch()
    assert [file.name for file in weight_files(tmp_path)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_saving_names_the_files(tmp_path):
    files = save_weights(hf.ViTForImageClassification(vit()), tmp_path)
    assert files == [tmp_path / "model.safetensors"] and files[0].is_file()


@pytest.mark.parametrize("key", [LAYER, f"{LAYER}_scale", "classifier.bias"], ids=["bits", "scales", "head"])
def test_one_bit_of_the_weights_is_seen(folder, key):
    load(folder)
    flip_bit(folder / "model.safetensors", key)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors was changed or damaged: its SHA-256 is [0-9a-f]{64}"
    ):
        load(folder)
    (folder / CARD_NAME).unlink()
    load(folder)


def test_a_latent_checkpoint_is_checked_too(tmp_path):
    write_release(proxbit.binarize(hf.ViTForImageClassification(vit())), tmp_path / "latent")
    load(tmp_path / "latent")
    flip_bit(tmp_path / "latent" / "model.safetensors", LAYER)
    with pytest.raises(CheckpointError, match="was changed or damaged"):
        load(tmp_path / "latent")


def test_weights_that_the_card_does_not_know(folder):
    """They were saved into the folder of a release, in another number of files."""
    load(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-0000\d\.safetensors is not in quantization_card.json"):
        load(folder)


DAMAGED_CARDS = ["{", "[]", "{}", '{"files": {"model.safetensors": 1}}', '{"files": null}', '{"files": [1]}']


def test_a_damaged_card(folder):
    for text in DAMAGED_CARDS:
        (folder / CARD_NAME).write_text(text)
        with pytest.raises(CheckpointError, match="quantization_card.json is damaged, so the weights"):
            load(folder)


def test_a_card_of_a_later_version_still_checks(folder):
    card = json.loads((folder / CARD_NAME).read_text()) | {"card_format": 99, "something": "new"}
    (folder / CARD_NAME).write_text(json.dumps(card))
    load(folder)
    flip_bit(folder / "model.safetensors", LAYER)
    with pytest.raises(CheckpointError):
        load(folder)


def test_nothing_is_checked_of_a_float_model(tmp_path):
    """A card there is of something else."""
    hf.ViTForImageClassification(vit()).save_pretrained(tmp_path)
    (tmp_path / CARD_NAME).write_text("{")
    load(tmp_path)


def test_a_snapshot_of_the_hub_is_checked(cache):
    folder, snapshot = cache
    load("me/vit", cache_dir=folder)
    flip_bit(snapshot / "model.safetensors", f"{LAYER}_scale")
    with pytest.raises(CheckpointError, match="model.safetensors was changed or damaged"):
        load("me/vit", cache_dir=folder)


def test_a_card_that_is_not_in_the_cache_is_fetched_as_the_weights_were(cache, monkeypatch, tmp_path):
    folder, snapshot = cache
    card = shutil.move(snapshot / CARD_NAME, tmp_path / CARD_NAME)
    asked = []

    def fetch(repository, name, **arguments):
        asked.append((repository, name, arguments))
        return str(card)

    monkeypatch.setattr(downloads, "cached_file", fetch)
    load("me/vit", cache_dir=folder, token="hf_secret", local_files_only=True)
    ((repository, name, arguments),) = asked
    assert (repository, name) == ("me/vit", CARD_NAME)
    assert arguments["revision"] == COMMIT and arguments["token"] == "hf_secret"
    assert str(arguments["cache_dir"]) == str(folder) and arguments["local_files_only"] is True
    flip_bit(snapshot / "model.safetensors", LAYER)
    with pytest.raises(CheckpointError, match="was changed or damaged"):
        load("me/vit", cache_dir=folder)


def test_a_repository_without_a_card_loads(cache):
    folder, snapshot = cache
    (snapshot / CARD_NAME).unlink()
    load("me/vit", cache_dir=folder)


def test_all_files_are_looked_at(folder, tmp_path):
    """The second of two is damaged."""
    model = load(folder)
    shards = tmp_path / "shards"
    model.save_pretrained(shards, max_shard_size="20KB")
    files = weight_files(shards)
    assert len(files) > 1
    known = {file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in files}
    (shards / CARD_NAME).write_text(json.dumps({"files": known}))
    check_files(shards / CARD_NAME, files)
    load(shards)
    content = files[-1].read_bytes()
    files[-1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=files[-1].name):
        load(shards)
