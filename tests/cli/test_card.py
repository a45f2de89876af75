"""`proxbit card`: of a release, of a folder without a card, of the Hub's cache; alone, beside another, as JSON."""

import json
import shutil

import pytest
import transformers as hf
from typer.testing import CliRunner

import proxbit
from proxbit.analysis.card import CARD_FIELDS, CARD_NAME, QuantizationCard
from proxbit.cli.app import app
from proxbit.cli.card import card_of
from proxbit.errors import CardError, CheckpointError
from proxbit.hub.release import write_release
from tiny_models import vit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    model = proxbit.pack(proxbit.binarize(hf.ViTForImageClassification(vit())))
    return write_release(model, tmp_path_factory.mktemp("card") / "vit", run={"license": "mit", "seeds": [3]})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A float model in half precision, as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("card") / "float"
    hf.ViTForImageClassification(vit()).bfloat16().save_pretrained(folder)
    return folder


def run(*arguments):
    done = CliRunner().invoke(app, ["card", *map(str, arguments)], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    return done.stdout


def test_one_card_in_80_columns(release, monkeypatch):
    monkeypatch.chdir(release.parent)
    text = run("vit")
    assert max(map(len, text.splitlines())) <= 80
    assert all(field.name in text for field in CARD_FIELDS)
    words = text.split()
    assert words[words.index("weight_quantizer") + 1] == "bnn++"
    assert words[words.index("seeds") + 1] == "3"
    assert words[words.index("latency_source") + 1] == "unknown" and "≠" not in text


def test_two_cards_side_by_side(release, plain, monkeypatch):
    monkeypatch.chdir(release.parent)
    text = run("vit", "--against", plain)
    lines = {line.split()[1]: line for line in text.splitlines() if line.strip().startswith("≠") and line.split()[1:]}
    assert max(map(len, text.splitlines())) <= 80
    assert {"state", "avg_weight_bits", "model_bytes", "seeds"} <= set(lines)
    assert "model_class" not in lines and "dataset" not in lines
    assert lines["state"].split()[-2:] == ["packed", "float"] and lines["skip_precision"].split()[-1] == "bfloat16"


def test_json(release, plain):
    assert json.loads(run(release, "--json")) == QuantizationCard.load(release).to_dict()
    both = json.loads(run(release, "--against", plain, "--json"))
    assert both["model"]["state"] == "packed" and both["against"]["state"] == "float"


def test_a_model_without_a_card_gets_one_computed(release, plain, tmp_path):
    """In its own precision, of its own files."""
    card = card_of(str(plain))
    assert (card.weight_bits, card.avg_weight_bits) == (16, 16)
    assert card.model_bytes == (plain / "model.safetensors").stat().st_size
    copy = shutil.copytree(release, tmp_path / "vit")
    (copy / CARD_NAME).unlink()
    said, computed = QuantizationCard.load(release).to_dict(), card_of(str(copy)).to_dict()
    assert {name for name in said if said[name] != computed[name]} == {"seeds"}
    assert sorted(path.name for path in copy.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("with_card", [True, False])
def test_a_name_on_the_hub(release, tmp_path, monkeypatch, with_card):
    repository = tmp_path / "models--me--vit"
    snapshot = shutil.copytree(release, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    if not with_card:
        (snapshot / CARD_NAME).unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    card = card_of("me/vit")
    assert card.files == QuantizationCard.load(release).files
    assert card.model_id == (None if with_card else "me/vit") and card.base_model is None


def test_refusals(release, tmp_path):
    with pytest.raises(CheckpointError, match="There is no model 'nobody/nothing', neither in a folder nor on the hub"):
        card_of("nobody/nothing")
    copy = shutil.copytree(release, tmp_path / "vit")
    with open(copy / "model.safetensors", "ab") as stream:
        stream.write(b"\0")
    with pytest.raises(CheckpointError, match="model.safetensors was changed or damaged"):
        card_of(str(copy))
    (copy / CARD_NAME).write_text("{}")
    with pytest.raises(CardError, match="has card_format None"):
        card_of(str(copy))
