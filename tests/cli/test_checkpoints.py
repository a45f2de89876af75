"""Names become models, models become folders; mistakes become sentences."""

import json

import pytest
import torch
import transformers as hf

import proxbit
from picture_folders import tiny_classifier
from proxbit.cli.checkpoints import architecture, check_new_folder, load_model, load_processor, save
from proxbit.errors import CheckpointError
from proxbit.patching import state_of
from tiny_models import vit


@pytest.fixture
def folder(tmp_path):
    return tiny_classifier(tmp_path / "float")


def test_a_model_comes_in_the_class_of_its_configuration(tmp_path, folder):
    assert architecture(str(folder))[1] is hf.ViTForImageClassification
    hf.ViTModel(vit()).save_pretrained(tmp_path / "backbone")
    assert type(load_model(str(tmp_path / "backbone"))) is hf.ViTModel


@pytest.mark.parametrize("state", ["float", "latent", "packed"])
def test_every_state_is_loaded_ready_to_be_used(tmp_path, folder, state, capsys):
    model = load_model(str(folder))
    if state != "float":
        proxbit.binarize(model)
        if state == "packed":
            proxbit.pack(model)
        save(model, load_processor(str(folder)), tmp_path / state)
        assert f"Wrote {tmp_path / state}" in capsys.readouterr().out
    loaded = load_model(str(tmp_path / state))
    assert state_of(loaded) == state and not loaded.training
    assert isinstance(load_processor(str(tmp_path / state)), hf.ViTImageProcessorPil)


def test_a_file_is_not_the_folder_that_it_lies_in(folder):
    with pytest.raises(CheckpointError, match=r"it is a file\. Name the folder"):
        load_model(str(folder / "config.json"))


def test_a_damaged_image_processor_is_not_passed_over(folder, tmp_path):
    (folder / "preprocessor_config.json").write_text('{"size": ')
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json cannot be read"):
        load_processor(str(folder))
    assert load_processor(str(tmp_path)) is None


@pytest.mark.parametrize("harm", ["nowhere", "no weights", "cut off", "pickled"])
def test_what_is_no_model_is_refused(folder, harm):
    weights = folder / "model.safetensors"
    if harm == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif harm != "nowhere":
        weights.unlink()
    if harm == "pickled":
        torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="There is no model" if harm == "nowhere" else "safetensors"):
        load_model(str(folder / "nowhere" if harm == "nowhere" else folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (None, r"There is no model in '.*float': it holds no config.json"),
        ("{", r"There is no model in '.*float' that can be read: .*JSON"),
        ({"model_type": "nope"}, r"There is no model in '.*' that can be read: .*`nope`"),
        (
            {"hidden_size": "wide"},
            r"There is no model in '.*' that can be read: .*'hidden_size'.* expected int, got str",
        ),
        ({"hidden_size": 40}, r"'.*' cannot be made: the weights have other sizes than its config.json says"),
        ({"quantization_config": {"quant_method": "awq"}}, r"'.*' cannot be made: .*requires"),
    ],
    ids=["none", "no json", "type", "kind", "sizes", "foreign"],
)
def test_what_is_wrong_with_a_configuration_is_said(folder, changes, words):
    file = folder / "config.json"
    text = json.dumps(json.loads(file.read_text()) | changes) if isinstance(changes, dict) else changes
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(CheckpointError, match=words):
        load_model(str(folder))


def test_there_need_be_no_processor(tmp_path):
    hf.ViTModel(vit()).save_pretrained(tmp_path)
    assert load_processor(str(tmp_path)) is None


def test_only_a_new_or_empty_folder_is_written_to(tmp_path):
    (tmp_path / "file").write_text("x")
    check_new_folder(tmp_path / "new" / "deep")
    (tmp_path / "empty").mkdir()
    check_new_folder(tmp_path / "empty")
    for taken in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError):
            check_new_folder(taken)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", r"There is no model './nowhere': there is no folder of that name\.$"),
        ("runs/flaot", r"There is no model 'runs/flaot': there is no folder .* \(did you mean 'runs/float'\?\)\.$"),
        ("someone/model", "There is no model 'someone/model': there is no folder .* HF_HUB_OFFLINE"),
        ("\x1b[2J\n", r"There is no model '\\\\x1b"),
    ],
)
@pytest.mark.parametrize("load", [architecture, load_model, load_processor])
def test_a_name_of_nothing_is_told_with_the_reason(tmp_path, monkeypatch, name, words, load):
    (tmp_path / "runs" / "float").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=words) as refused:
        load(name)
    assert str(refused.value).isprintable()


def test_code_of_a_repository_is_not_run(folder, monkeypatch):
    """And nobody is asked whether it may."""
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n")
    (folder / "config.json").write_text('{"model_type": "evilvit", "auto_map": {"AutoConfig": "evil.EvilConfig"}}')
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(CheckpointError):
        load_model(str(folder))
    assert not (folder / "ran").exists()
