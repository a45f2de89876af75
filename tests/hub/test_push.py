"""Uploads through the real `huggingface_hub` to the Hub of the tests, and what goes wrong with them."""

import hashlib
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import proxbit
from hub_server import Fault
from proxbit.errors import CheckpointError, HubError, ModelStateError
from proxbit.hub.push import plan_upload, upload
from tiny_models import vit

PUT = r"/storage/"


def send(folder, repo="me/tiny", **changes):
    return upload(plan_upload(folder, repo, **changes))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same packed model in one file, and in three."""
    folder = tmp_path_factory.mktemp("saved")
    model = proxbit.pack(proxbit.binarize(hf.ViTForImageClassification(vit())))
    model.save_pretrained(folder / "packed")
    model.save_pretrained(folder / "shards", max_shard_size="10KB")
    assert len(list(folder.glob("shards/model-*.safetensors"))) == 3
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved / "packed", tmp_path / "packed"))


@pytest.fixture
def shards(saved, tmp_path):
    return Path(shutil.copytree(saved / "shards", tmp_path / "shards"))


@pytest.fixture
def waits(monkeypatch):
    """How many seconds the client waited before it tried again: it does not really."""
    waited = []
    clock = SimpleNamespace(**vars(time) | {"sleep": waited.append})
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    return waited


def refused(act, *words):
    """One line that says what to do."""
    with pytest.raises(HubError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    assert all(word in message for word in words), message


# --- what is uploaded


def test_what_is_in_the_folder_is_on_the_hub(hub, folder):
    planned = plan_upload(folder, "me/tiny")
    assert planned.files == {name: len(data) for name, data in contents(folder).items()}
    assert planned.bytes == sum(planned.files.values()) and planned.url == f"{hub.url}/me/tiny"
    commit = upload(planned, message="first")
    repository = hub.hub.repositories["me/tiny"]
    files = repository.files()
    assert files.pop(".gitattributes") and files == contents(folder)
    assert commit == f"{hub.url}/me/tiny/commit/{repository.branches['main']}"
    assert repository.titles == ["initial commit", "first"] and not repository.private


def test_nothing_else_of_the_folder_leaves_the_machine(hub, folder):
    torch.save({}, folder / "training_args.bin")
    (folder / ".env").write_text("secret")
    (folder / "checkpoint-3").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "checkpoint-3")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    send(folder)
    names = set(hub.hub.repositories["me/tiny"].files())
    assert names == {".gitattributes", "README.md", "config.json", "model.safetensors"}


def test_a_name_without_an_owner_is_ones_own(hub, folder):
    assert plan_upload(folder, "tiny").repo == "me/tiny"


def test_private_and_on_a_branch(hub, folder):
    planned = plan_upload(folder, "me/tiny", revision="next/one")
    upload(planned, private=True)
    upload(planned, private=True)
    repository = hub.hub.repositories["me/tiny"]
    assert repository.private and planned.url.endswith("/me/tiny/tree/next%2Fone")
    assert set(repository.files("main")) == {".gitattributes"} and "config.json" in repository.files("next/one")


def test_files_of_an_earlier_upload_do_not_stay_in_the_way(hub, folder, shards):
    """transformers prefers `model.safetensors` to shards: it would go on loading the first upload."""
    (folder / "quantization_card.json").write_text("{}")
    send(folder)
    send(shards)
    files = set(hub.hub.repositories["me/tiny"].files())
    assert files == {".gitattributes", *contents(shards)}


def test_the_same_again_is_no_new_commit(hub, folder):
    assert send(folder) == send(folder)
    assert hub.count("PUT", PUT) == 1


# --- what is refused before anything is sent


def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors), file, metadata={"format": "pt"})


def set_config(folder, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": value}))


DAMAGE = {
    "no folder": (shutil.rmtree, CheckpointError, "holds no model: there is no config.json"),
    "no json": (lambda f: (f / "config.json").write_text("{"), CheckpointError, "config.json cannot be read"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "config.json cannot be read"),
    "float": (lambda f: set_config(f, None), ModelStateError, "is float, not one of proxbit. Pack one"),
    "of others": (lambda f: set_config(f, {"quant_method": "awq"}), ModelStateError, "is awq, not one of proxbit"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "lacks model.safetensors"),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
        CheckpointError,
        "model.safetensors is truncated or damaged",
    ),
    "not packed": (
        lambda f: edit(f, lambda tensors: {key: tensor.float() for key, tensor in tensors.items()}),
        CheckpointError,
        "says packed, but no weight in it is",
    ),
}


@pytest.mark.parametrize("damage, error, words", DAMAGE.values(), ids=DAMAGE)
def test_what_is_no_packed_model_is_refused(hub, folder, damage, error, words):
    damage(folder)
    with pytest.raises(error, match=words):
        plan_upload(folder, "me/tiny")
    assert hub.log == []


@pytest.mark.parametrize("damage, words", [("shard", "lacks model-00002-of-00003"), ("index", "index.json is damaged")])
def test_a_model_in_pieces_is_uploaded_whole_or_not_at_all(hub, shards, damage, words):
    if damage == "shard":
        (shards / "model-00002-of-00003.safetensors").unlink()
    else:
        (shards / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=words):
        plan_upload(shards, "me/tiny")


def test_a_latent_model_is_uploaded_when_asked(hub, tmp_path):
    proxbit.binarize(hf.ViTForImageClassification(vit())).save_pretrained(tmp_path / "latent")
    with pytest.raises(ModelStateError, match=r"is latent, as large as a float one.*--latent, latent=True"):
        plan_upload(tmp_path / "latent", "me/tiny")
    assert hub.log == []
    send(tmp_path / "latent", latent=True)
    assert hub.hub.repositories["me/tiny"].titles[-1] == "Upload a latent model"


# --- what goes wrong on the way


def test_without_a_token_the_hub_asks_who_it_is(hub, folder, monkeypatch):
    hub.sign_in(monkeypatch, None)
    refused(lambda: send(folder), "me/tiny was not uploaded", "`hf auth login`", "--token", "(401)")


def test_a_wrong_token_is_said(hub, folder):
    refused(lambda: plan_upload(folder, "tiny", token="hf_wrong"), "`hf auth login`", "(401)")
    refused(lambda: upload(plan_upload(folder, "me/tiny"), token="hf_wrong"), "`hf auth login`", "(401)")


def test_the_repository_of_another_one_is_not_written_to(hub, folder, monkeypatch):
    refused(lambda: send(folder, "other/tiny"), "other/tiny was not uploaded: this token may not write there", "(403)")
    send(folder)
    hub.sign_in(monkeypatch, "hf_other")
    refused(lambda: send(folder), "may not write there")
    hub.hub.repositories["me/tiny"].private = True
    refused(lambda: send(folder), "may not write there")


def test_a_name_that_cannot_be_is_said(hub, folder):
    refused(lambda: send(folder, "me/a/b"), "me/a/b was not uploaded", "Repo id")
    refused(lambda: send(folder, "me/-a b"), "me/-a b was not uploaded", "Repo id")


def test_a_branch_that_is_gone_is_said(hub, folder):
    hub.faults = [Fault("POST", "/preupload/", status=404)]
    refused(lambda: send(folder), "there is no such repository or branch", "(404)")


def test_too_many_requests_are_waited_for(hub, folder, waits):
    """Where the client tries again by itself, as long as the Hub says (and a second more)."""
    hub.faults = [Fault("POST", "/objects/batch", status=429, headers={"Retry-After": "7"})]
    send(folder)
    assert waits == [8.0] and "model.safetensors" in hub.hub.repositories["me/tiny"].files()


def test_too_many_requests_where_the_client_gives_up(hub, folder):
    hub.faults = [Fault("POST", "/repos/create", status=429, headers={"Retry-After": "7"})]
    refused(lambda: send(folder), "too many requests. Run the same again", "(429; wait 7 s)")
    send(folder)


@pytest.mark.parametrize("path", ["/preupload/", "/objects/batch", "/complete/"])
def test_one_failure_of_the_hub_goes_unseen(hub, folder, waits, path):
    hub.faults = [Fault("POST", path, status=500)]
    send(folder)
    assert waits == [1] and len(hub.hub.repositories["me/tiny"].commits) == 2


@pytest.mark.parametrize("path", ["/repos/create", "/branch/", "/commit/"])
def test_one_failure_of_the_hub_that_the_client_gives_up_at(hub, folder, path):
    hub.faults = [Fault("POST", path, status=500)]
    refused(lambda: send(folder, revision="next"), "the Hub failed (500). Run the same again: it goes on where it")
    send(folder, revision="next")
    assert hub.count("PUT", PUT) == 1


def test_a_dropped_connection_is_tried_again(hub, folder, waits):
    hub.faults = [Fault("PUT", PUT, drop=20_000)]
    send(folder)
    assert waits == [1] and hub.count("PUT", PUT) == 2


def test_an_interrupted_upload_is_resumed(hub, shards, waits):
    """Two of three shards arrive; the connection of the third breaks for good, in the middle. Then the same again."""
    planned = plan_upload(shards, "me/tiny")
    largest = max(shards.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    sha256 = hashlib.sha256(largest.read_bytes()).hexdigest()
    hub.faults = [Fault("PUT", sha256, drop=5_000, times=6)]
    refused(lambda: upload(planned), "me/tiny was not uploaded", "Run the same again: it goes on where it stopped")
    assert len(waits) == 5 and len(hub.hub.storage) == 2
    assert set(hub.hub.repositories["me/tiny"].files()) == {".gitattributes"}
    before = hub.count("PUT", PUT)
    upload(planned)
    assert hub.count("PUT", PUT) == before + 1
    assert contents(shards).items() <= hub.hub.repositories["me/tiny"].files().items()


def test_offline_nothing_is_uploaded(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(lambda: send(folder), "offline mode is enabled", "HF_HUB_OFFLINE")
    assert hub.log == []


def test_a_hub_that_is_not_there(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(lambda: send(folder), "Connection refused", "Run the same again")
