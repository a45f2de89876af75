"""What is uploaded, and what is refused before anything is sent: the real client, and the Hub of the tests."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file, save_file

import proxbit
from proxbit.analysis.card import QuantizationCard
from proxbit.checkpoint.files import CARD_NAME
from proxbit.errors import CheckpointError, HubError, ModelStateError, PackedFormatError
from proxbit.hub.client import client
from proxbit.hub.push import prepare_upload, upload
from tiny_models import vit

RELEASE = {"README.md", "config.json", "model.safetensors", CARD_NAME}


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def on_the_hub(hub, revision="main"):
    files = hub.hub.repositories["me/tiny"].files(revision)
    assert files.pop(".gitattributes")
    return files


def latent():
    return proxbit.binarize(hf.ViTForImageClassification(vit()))


# --- what is uploaded


def test_a_release_is_uploaded_as_it_is_but_for_its_name(hub, release):
    """The folder did not know what it would be called: its cards name the repository, and the folder stays."""
    before = contents(release)
    with prepare_upload(release, "me/tiny") as planned:
        assert planned.bytes == sum(planned.files.values()) and planned.url == f"{hub.url}/me/tiny"
        assert planned.state == "packed" and hub.log == []
        commit = upload(planned, message="first")
    repository, files = hub.hub.repositories["me/tiny"], on_the_hub(hub)
    assert commit == f"{hub.url}/me/tiny/commit/{repository.branches['main']}"
    assert repository.titles == ["initial commit", "first"] and not repository.private
    assert contents(release) == before and set(files) == set(before) == set(planned.files)
    assert {name for name in files if files[name] != before[name]} == {"README.md", CARD_NAME}
    card, card_before = json.loads(files[CARD_NAME]), json.loads(before[CARD_NAME])
    assert card == {**card_before, "model_id": "me/tiny"} != card_before
    load = b'model = ViTForImageClassification.from_pretrained("%s")'
    lines = zip(before["README.md"].splitlines(), files["README.md"].splitlines(), strict=True)
    assert [pair for pair in lines if pair[0] != pair[1]] == [
        (b"# release", b"# tiny"),
        (load % b"release", load % b"me/tiny"),
        (b"| `model_id` | unknown | name on the Hub |", b"| `model_id` | me/tiny | name on the Hub |"),
    ]


@pytest.mark.parametrize("kind", ["plain", "shards"])
def test_cards_that_are_missing_are_written_for_the_upload(hub, kind, request):
    """They are of these very files; the folder itself stays as it is."""
    folder = request.getfixturevalue(kind)
    before = contents(folder)
    proxbit.push(folder, "me/tiny", run={"license": "mit"})
    files = on_the_hub(hub)
    assert contents(folder) == before and before.items() <= files.items()
    assert set(files) - set(before) == {"README.md", CARD_NAME}
    card = json.loads(files[CARD_NAME])
    assert card["model_id"] == "me/tiny"
    sizes = {name: len(data) for name, data in before.items() if name.endswith(".safetensors")}
    assert {name: facts["bytes"] for name, facts in card["files"].items()} == sizes
    front, text = files["README.md"].decode().removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["license"] == "mit" and 'from_pretrained("me/tiny")' in text


def test_a_card_of_the_users_own_is_kept(hub, plain):
    (plain / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    proxbit.push(plain, "me/tiny")
    assert on_the_hub(hub)["README.md"].endswith(b"Mine.\n")


def test_a_model_is_uploaded_with_its_processor(hub):
    model = proxbit.pack(latent())
    proxbit.push(model, "me/tiny", processing_class=hf.ViTImageProcessorPil(size={"height": 32, "width": 32}))
    files = on_the_hub(hub)
    assert set(files) == RELEASE | {"preprocessor_config.json"}
    assert b'pipeline("image-classification", model="me/tiny")' in files["README.md"]


def test_nothing_else_of_the_folder_leaves_the_machine(hub, release):
    torch.save({}, release / "training_args.bin")
    (release / ".secrets.json").write_text("{}")
    (release / "notes").write_text("secret")
    (release / "checkpoint-3").mkdir()
    shutil.copy(release / "model.safetensors", release / "checkpoint-3")
    proxbit.push(release, "me/tiny")
    assert set(on_the_hub(hub)) == RELEASE


def test_a_name_without_an_owner_is_ones_own(hub, release):
    with prepare_upload(release, "tiny") as planned:
        assert planned.repo == "me/tiny"


def test_private_and_on_a_branch(hub, release):
    with prepare_upload(release, "me/tiny", revision="next/one") as planned:
        assert planned.url.endswith("/me/tiny/tree/next%2Fone")
        upload(planned, private=True)
        upload(planned, private=True)
    assert hub.hub.repositories["me/tiny"].private
    assert on_the_hub(hub) == {} and set(on_the_hub(hub, "next/one")) == RELEASE


def test_weights_of_an_earlier_upload_do_not_stay_in_the_way(hub, release, shards):
    """transformers prefers `model.safetensors` to pieces: it would go on loading the first upload."""
    proxbit.push(release, "me/tiny")
    proxbit.push(shards, "me/tiny")
    assert set(on_the_hub(hub)) == {*contents(shards), "README.md", CARD_NAME}


def test_the_same_again_is_no_new_commit(hub, release):
    assert proxbit.push(release, "me/tiny") == proxbit.push(release, "me/tiny")
    assert hub.count("PUT", "/storage/") == 1


def test_a_latent_model_is_uploaded_when_asked(hub, tmp_path):
    model = latent()
    model.save_pretrained(tmp_path / "latent")
    for source in (model, tmp_path / "latent"):
        with pytest.raises(ModelStateError, match=r"is latent, as large as a float one.*--latent, latent=True"):
            proxbit.push(source, "me/tiny")
        assert hub.log == []
    proxbit.push(tmp_path / "latent", "me/tiny", latent=True)
    assert hub.hub.repositories["me/tiny"].titles[-1] == "Upload a latent model"
    loaded = hf.AutoModelForImageClassification.from_pretrained("me/tiny").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


# --- what is refused before anything is sent


def edit(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def cut_off(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])


DAMAGE = {
    "no folder": (shutil.rmtree, CheckpointError, "holds no model: there is no config.json"),
    "no json": (lambda f: (f / "config.json").write_text("{"), CheckpointError, "config.json cannot be read"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "config.json is damaged"),
    "a word": (
        lambda f: set_config(f, quantization_config="w1a8"),
        CheckpointError,
        r"quantization_config of .*config.json is damaged: 'w1a8'",
    ),
    "float": (lambda f: set_config(f, quantization_config=None), ModelStateError, "is float, not one of proxbit. Pack"),
    "foreign": (lambda f: set_config(f, quantization_config={"quant_method": "awq"}), ModelStateError, "is awq, not"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "has no file model.safetensors"),
    "cut off": (cut_off, CheckpointError, "model.safetensors is truncated or damaged"),
    "not packed": (
        lambda f: edit(f, lambda tensors: {key: tensor.float() for key, tensor in tensors.items()}),
        CheckpointError,
        "expected packed bits",
    ),
    "scales": (
        lambda f: edit(f, lambda t: {k: v * float("nan") if k.endswith("_scale") else v for k, v in t.items()}),
        PackedFormatError,
        "weight_scale",
    ),
    "class": (
        lambda f: set_config(f, architectures=["OwnViT"]),
        CheckpointError,
        "names OwnViT, which transformers does not have.*proxbit.push",
    ),
    "sizes": (lambda f: set_config(f, hidden_size=40), CheckpointError, "do not fit the model"),
}


@pytest.mark.parametrize("damage, error, words", DAMAGE.values(), ids=DAMAGE)
def test_what_is_no_packed_model_is_refused(hub, plain, damage, error, words):
    damage(plain)
    with pytest.raises(error, match=words):
        proxbit.push(plain, "me/tiny")
    assert hub.log == []


def test_weights_that_are_not_those_of_the_card_are_refused(hub, release):
    edit(release, lambda tensors: {key: tensor.clone() * 1 for key, tensor in reversed(tensors.items())})
    scales = load_file(release / "model.safetensors")
    scales[next(key for key in scales if key.endswith("_scale"))] *= 2
    save_file(scales, release / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"model.safetensors was changed or damaged.*{CARD_NAME}"):
        proxbit.push(release, "me/tiny")
    assert hub.log == []


@pytest.mark.parametrize(
    "damage, words", [("shard", "00002-of-00003.safetensors is missing"), ("index", "index.json is damaged")]
)
def test_a_model_in_pieces_is_uploaded_whole_or_not_at_all(hub, shards, damage, words):
    if damage == "shard":
        (shards / "model-00002-of-00003.safetensors").unlink()
    else:
        (shards / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=words):
        proxbit.push(shards, "me/tiny")


@pytest.mark.parametrize("model", [lambda: hf.ViTForImageClassification(vit()), lambda: torch.nn.Linear(2, 2)])
def test_a_model_that_is_not_of_proxbit_is_refused(hub, model):
    with pytest.raises(ModelStateError):
        proxbit.push(model(), "me/tiny")
    assert hub.log == []


def test_the_card_says_what_the_folder_holds(hub, release):
    """What was uploaded as a release is one again, wherever it is pulled."""
    proxbit.push(release, "me/tiny")
    for name, data in on_the_hub(hub).items():
        (release / name).write_bytes(data)
    assert QuantizationCard.load(release).state == "packed"


# --- what is on the Hub already


@pytest.mark.parametrize("ours", [True, False])
def test_a_text_that_somebody_wrote_stays(hub, release, ours):
    """An older card of proxbit is replaced; and a text beside the model goes up whatever is there."""
    written = b"---\nlicense: mit\n---\n# Months of work\n" + (b"made with proxbit (ProxConnect++)" if ours else b"")
    api = client()
    api.create_repo("me/tiny")
    api.upload_file(path_or_fileobj=written, path_in_repo="README.md", repo_id="me/tiny")
    with nullcontext() if ours else pytest.warns(UserWarning, match="README.md of me/tiny is no model card"):
        proxbit.push(release, "me/tiny")
    files = on_the_hub(hub)
    assert (files["README.md"] == written) is not ours and set(files) == RELEASE
    (release / "README.md").write_text("# By hand")
    proxbit.push(release, "me/tiny")
    assert on_the_hub(hub)["README.md"] == b"# By hand"


def test_a_commit_to_a_pull_request_makes_no_branch(hub, release):
    """The Hub refuses to make one of that name."""
    proxbit.push(release, "me/tiny")
    hub.hub.repositories["me/tiny"].branches["refs/pr/1"] = hub.hub.repositories["me/tiny"].branches["main"]
    hub.log.clear()
    proxbit.push(release, "me/tiny", revision="refs/pr/1", message="once more")
    assert not any("/branch/" in str(line) for line in hub.log)


NO_NAMES = ["me/", "me/..", "a/b/c", ""]


def test_what_is_no_name_is_refused(hub, release):
    for name in NO_NAMES:
        with pytest.raises(HubError, match="was not uploaded: Repo id must"):
            proxbit.push(release, name)
        assert hub.log == []
