"""From the Hub: what a user calls, what goes wrong on the way, and the whole way to another machine and back."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load, save

import proxbit
from hub_server import Fault, File
from proxbit.checkpoint.files import CARD_NAME
from proxbit.errors import CheckpointError
from tiny_models import SIDE, vit


def packed(seed=0):
    torch.manual_seed(seed)
    model = hf.ViTForImageClassification(vit())
    torch.nn.init.normal_(model.classifier.weight)
    return proxbit.pack(proxbit.binarize(model)).eval()


def pull(repo="me/tiny", **changes):
    return hf.AutoModelForImageClassification.from_pretrained(repo, **changes)


def same(model, other):
    mine, others = model.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(others[key], value) for key, value in mine.items())


@pytest.fixture
def pushed(hub):
    """A packed model, and as `me/tiny` on the Hub."""
    model = packed()
    proxbit.push(model, "me/tiny")
    return model


# --- what a user calls


def test_each_revision_is_itself(hub, pushed):
    first = hub.hub.repositories["me/tiny"].branches["main"]
    others = {"next": packed(1), "main": packed(2)}
    for revision, model in others.items():
        proxbit.push(model, "me/tiny", revision=revision)
    assert same(pushed, pull(revision=first))
    assert same(others["next"], pull(revision="next")) and same(others["main"], pull())
    with pytest.raises(OSError, match="never is not a valid git identifier"):
        pull(revision="never")


def test_a_private_repository_takes_the_token(hub, monkeypatch):
    model = packed()
    proxbit.push(model, "me/tiny", private=True)
    for token in (None, "hf_other"):
        hub.sign_in(monkeypatch, token)
        with pytest.raises(OSError, match="If this is a private repository, make sure to pass a token"):
            pull()
    assert same(model, pull(token="hf_me"))


# --- what goes wrong on the way


@pytest.mark.parametrize("key", [".weight_scale", ".weight"])
def test_a_repository_that_was_tampered_with_is_refused(hub, pushed, key):
    """One bit, of scales or packed weights; the Hub announces the changed bytes as its own. The card knows better."""
    repository = hub.hub.repositories["me/tiny"]
    files = repository.commits[repository.branches["main"]]
    tensors = load(files["model.safetensors"].data)
    name = next(name for name in tensors if name.endswith(key) and f"{name.removesuffix('_scale')}_scale" in tensors)
    tensors[name].view(torch.uint8).view(-1)[0] ^= 1
    data = save(tensors, metadata={"format": "pt"})
    files["model.safetensors"] = File(data, large=True)
    hub.hub.storage[hashlib.sha256(data).hexdigest()] = data
    with pytest.raises(CheckpointError, match=rf"model.safetensors was changed or damaged.*{CARD_NAME}"):
        pull()


def test_a_wrong_token_is_said(hub, pushed, monkeypatch):
    hub.sign_in(monkeypatch, "hf_wrong")
    with pytest.raises(OSError, match="401|token"):
        pull()


def test_a_repository_that_is_not_there_is_said(hub, pushed):
    with pytest.raises(OSError, match="me/nothing is not a local folder and is not a valid model identifier"):
        pull("me/nothing")


@pytest.mark.parametrize(
    "method, path, status, times, waited",
    [
        ("HEAD", "/resolve/.*/model.safetensors", 500, 2, [1]),
        ("HEAD", "/resolve/.*/model.safetensors", 429, 2, [8.0]),
        ("GET", "/storage/", 429, 1, [8.0]),
    ],
)
def test_failures_are_tried_again(hub, pushed, waits, method, path, status, times, waited):
    """After as many seconds as the Hub says, and one more."""
    headers = {"Retry-After": "7"} if status == 429 else {}
    hub.faults = [Fault(method, path, status=status, headers=headers, times=times)]
    assert same(pushed, pull())
    assert waits == waited


def test_a_failure_that_the_client_gives_up_at(hub, pushed):
    hub.faults = [Fault("GET", "/storage/", status=500)]
    with pytest.raises(OSError, match="500 Internal Server Error"):
        pull()
    assert same(pushed, pull())


# --- to another machine and back

ELSEWHERE = """
import hashlib, json, os, sys
from pathlib import Path
import proxbit
import torch
from transformers import AutoModelForImageClassification, pipeline

picture, token = sys.argv[1], sys.argv[2] or None
pictures = torch.load(picture + ".pt", weights_only=True)
load = AutoModelForImageClassification.from_pretrained
found = {"pipeline": pipeline("image-classification", model="me/tiny")(picture + ".png")}
for name, model in {
    "main": load("me/tiny"),
    "next": load("me/tiny", revision="next"),
    "private": load("me/private", token=token),
    "pieces": load("me/pieces"),
}.items():
    with torch.inference_mode():
        found[name] = model(pixel_values=pictures).logits.tolist()
snapshots = Path(os.environ["HF_HOME"]).glob("hub/models--me--*/snapshots/*/*")
found["files"] = {
    "/".join(file.parts[-4:]): hashlib.sha256(file.read_bytes()).hexdigest() for file in snapshots
}
print(json.dumps(found))
"""


def elsewhere(hub, home, arguments, **environment):
    """What a new process on another machine finds: a home of its own, and nothing but the name of the repository."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, arguments)],
        env=hub.environment(home, **environment),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_same_model_on_another_machine_and_then_without_a_network(hub, tmp_path, crops):
    processor = hf.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    models = {name: packed(seed) for seed, name in enumerate(("main", "next", "private", "pieces"))}
    proxbit.push(models["main"], "me/tiny", processing_class=processor)
    proxbit.push(models["next"], "me/tiny", processing_class=processor, revision="next")
    proxbit.push(models["private"], "me/private", private=True)
    models["pieces"].save_pretrained(tmp_path / "pieces", max_shard_size="10KB")
    proxbit.push(tmp_path / "pieces", "me/pieces")

    pictures = crops(3, SIDE)
    torch.save(pictures, tmp_path / "picture.pt")
    photograph = ((pictures[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    Image.fromarray(np.ascontiguousarray(photograph)).save(tmp_path / "picture.png")

    online = elsewhere(hub, tmp_path / "new", [tmp_path / "picture", "hf_me"])
    for name, model in models.items():
        with torch.inference_mode():
            assert torch.equal(torch.tensor(online[name]), model(pixel_values=pictures).logits), name
    here = hf.pipeline("image-classification", model=models["main"], image_processor=processor)
    assert online["pipeline"] == here(str(tmp_path / "picture.png"))

    for path, sha256 in online["files"].items():
        owner, _, commit, name = path.split("/")
        repository = hub.hub.repositories[owner.removeprefix("models--").replace("--", "/")]
        assert hashlib.sha256(repository.commits[commit][name].data).hexdigest() == sha256
    assert {path.rpartition("/")[2] for path in online["files"]} >= {
        "config.json",
        "preprocessor_config.json",
        CARD_NAME,
    }

    hub.log.clear()
    assert elsewhere(hub, tmp_path / "new", [tmp_path / "picture", ""], HF_HUB_OFFLINE="1") == online
    assert hub.log == []
