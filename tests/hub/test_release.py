"""Release folders: what is in them, that they load, and that nothing of anybody's is lost."""

import json
import stat

import pytest
import torch
import transformers as hf
from huggingface_hub import ModelCard
from peft import LoraConfig

import proxbit
from proxbit.analysis.card import CARD_NAME, QuantizationCard
from proxbit.errors import CardError, CheckpointError, ModelStateError
from proxbit.hub.release import write_release
from tiny_models import SIDE, vit


def make(state="packed", **changes):
    model = proxbit.binarize(hf.ViTForImageClassification(vit(**changes)))
    return proxbit.pack(model) if state == "packed" else model


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def processor():
    return hf.ViTImageProcessor(size={"height": SIDE, "width": SIDE})


@pytest.mark.parametrize("state", ["packed", "latent"])
def test_a_release_is_whole_and_loads(tmp_path, crops, state):
    model, pictures = make(state).eval(), crops(2, SIDE)
    run = {"license": "mit", "metrics": {"hard": {"accuracy": 0.5}}, "dataset": "Crops"}
    folder = write_release(model, tmp_path / "new" / "vit", processing_class=processor(), run=run)
    assert folder == tmp_path / "new" / "vit"
    assert names(folder) == sorted(
        ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", CARD_NAME]
    )
    assert names(folder.parent) == ["vit"]
    card = QuantizationCard.load(folder)
    assert (card.state, card.quantized_top1, card.dataset) == (state, 0.5, "Crops")
    assert card.model_bytes == (folder / "model.safetensors").stat().st_size
    readme = ModelCard.load(folder / "README.md")
    assert readme.data.license == "mit" and card.to_markdown() in readme.text
    loaded = hf.AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(pictures).logits, model(pictures).logits)
    hf.AutoImageProcessor.from_pretrained(folder)


def test_the_folder_is_readable_like_any_other(tmp_path):
    (tmp_path / "any").mkdir()
    folder = write_release(make(), tmp_path / "vit")
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "any").stat().st_mode)


def test_an_older_release_is_replaced(tmp_path):
    write_release(make(num_labels=5), tmp_path / "vit", processing_class=processor())
    write_release(make(), tmp_path / "vit")
    assert json.loads((tmp_path / "vit" / "config.json").read_text())["id2label"].keys() == {"0", "1", "2"}
    assert "preprocessor_config.json" not in names(tmp_path / "vit")
    assert names(tmp_path) == ["vit"]


def test_an_empty_folder_and_a_relative_one(tmp_path, monkeypatch):
    (tmp_path / "vit").mkdir()
    monkeypatch.chdir(tmp_path)
    assert write_release(make(), "vit") == tmp_path / "vit"
    assert CARD_NAME in names(tmp_path / "vit")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["thesis.tex"], r"holds something else than a release of proxbit \(thesis.tex\)"),
        ([CARD_NAME, "config.json", "thesis.tex"], r"\(thesis.tex\), which would be lost"),
        (["config.json", "model.safetensors"], r"\(config.json, model.safetensors\)"),
        ([f"{n}.txt" for n in range(9)], r"\(0.txt, 1.txt, 2.txt, 3.txt, 4.txt, ...\)"),
    ],
    ids=["other", "release and other", "a model without a card", "many"],
)
def test_a_folder_with_something_else_stays_as_it_is(tmp_path, content, message):
    folder = tmp_path / "vit"
    folder.mkdir()
    for name in content:
        (folder / name).write_text("mine")
    with pytest.raises(CheckpointError, match=message):
        write_release(make(), folder)
    assert names(folder) == sorted(content) and names(tmp_path) == ["vit"]
    assert {path.read_text() for path in folder.iterdir()} == {"mine"}


def test_a_file_stays_as_it_is(tmp_path):
    (tmp_path / "vit").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file; a release is a folder"):
        write_release(make(), tmp_path / "vit")
    assert (tmp_path / "vit").read_text() == "mine"


@pytest.mark.parametrize(
    ("model", "run", "error", "message"),
    [
        (lambda: hf.ViTForImageClassification(vit()), None, ModelStateError, "packed or latent, this model is float"),
        (lambda: torch.nn.Linear(2, 2), None, ModelStateError, "loaded with from_pretrained, so a Linear cannot"),
        (make, {"acuracy": 1}, CardError, "'acuracy' is no field"),
    ],
    ids=["float", "plain module", "run"],
)
def test_refusals_leave_nothing(tmp_path, model, run, error, message):
    with pytest.raises(error, match=message):
        write_release(model(), tmp_path / "vit", run=run)
    assert names(tmp_path) == []


def test_a_failure_in_the_middle_leaves_the_old_release(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            (folder / "preprocessor_config.json").write_text("{")
            raise KeyboardInterrupt

    folder = write_release(make(), tmp_path / "vit")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        write_release(make(num_labels=5), folder, processing_class=Broken())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names(tmp_path) == ["vit"]


def test_a_place_that_cannot_be_taken_gives_the_old_release_back(tmp_path, monkeypatch):
    folder = write_release(make(), tmp_path / "vit")
    before = (folder / "model.safetensors").read_bytes()
    rename = type(folder).rename

    def refuse(self, target):
        if self.name == "new":
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", refuse)
    with pytest.raises(CheckpointError, match="vit could not be written: no"):
        write_release(make(num_labels=5), folder)
    assert (folder / "model.safetensors").read_bytes() == before and names(tmp_path) == ["vit"]


def test_a_model_with_an_adapter_is_refused(tmp_path):
    """Of such a model transformers saves the adapter alone."""
    model = make()
    model.add_adapter(proxbit.packed_lora(LoraConfig(r=2, target_modules=["q_proj"])))
    with pytest.raises(ModelStateError, match="carries an adapter"):
        write_release(model, tmp_path / "vit")
    assert names(tmp_path) == []
