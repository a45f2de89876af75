"""`proxbit binarize`: recipes and fields of the configuration, and what is refused."""

import inspect
import json
from dataclasses import fields

import pytest
from transformers import ViTForImageClassification
from typer.testing import CliRunner

import proxbit
from picture_folders import odd_folder, tiny_classifier
from proxbit.analysis.card import QuantizationCard
from proxbit.cli.app import app
from proxbit.cli.binarize import binarize
from proxbit.errors import CheckpointError, ConfigError, DataError, PatternError, UnknownNameError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_classifier(tmp_path_factory.mktemp("model") / "float")


def run(*arguments):
    return CliRunner().invoke(app, ["binarize", *map(str, arguments)])


def test_the_default_is_the_default_recipe(folder, tmp_path):
    done = run(folder, tmp_path / "out")
    assert done.exit_code == 0, done.exception
    assert "binarized 12 of 14 modules" in done.output and "left as they are" in done.output
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stored["weights"], stored["activations"], stored["state"]) == ("bnn++", "float", "latent")
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_options_take_the_place_of_the_recipe(folder, tmp_path):
    options = ["--recipe", "w1a8", "--weights", "parq", "--residual", "--modules-to-not-convert", "*.0.*"]
    overrides = {"*.mlp.fc2": {"activations": "sign"}}
    done = run(folder, tmp_path / "out", *options, "--overrides", json.dumps(overrides))
    assert done.exit_code == 0, done.exception
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stored["weights"], stored["activations"], stored["residual"]) == ("parq", "int8", True)
    assert stored["overrides"]["*.mlp.fc2"] == overrides["*.mlp.fc2"]
    assert not any(".0." in name for name in stored["include"])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (["--recipe", "w1a9"], UnknownNameError, "Did you mean"),
        (["--weights", "bnnn"], UnknownNameError, "Did you mean 'bnn'"),
        (["--overrides", "{x"], ConfigError, "--overrides must be JSON"),
        (["--pair-parameters", "[1]"], ConfigError, "--pair-parameters must be a JSON object"),
        (["--include", "nothing.*"], PatternError, "nothing"),
    ],
    ids=["recipe", "pair", "not json", "no object", "pattern"],
)
def test_refusals_write_nothing(folder, tmp_path, options, error, words):
    done = run(folder, tmp_path / "out", *options)
    assert isinstance(done.exception, error) and words in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_left_alone(folder, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    assert isinstance(run(folder, tmp_path).exception, CheckpointError)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.txt"]


def test_every_field_of_the_configuration_is_an_option():
    """But those that proxbit sets by itself."""
    options = set(inspect.signature(binarize).parameters)
    options -= {"model", "out", "recipe", "images", "output_dir", "num_images", "labels"}
    own = {item.name for item in fields(proxbit.BinarizationConfig)}
    assert options == own - {"state", "format_version", "quant_method", "calibration"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory, photographs):
    """Two parts, each with a folder a class, odd files and unreadable ones among them."""
    folder = tmp_path_factory.mktemp("photos")
    for part in ("train", "test"):
        odd_folder(folder / part, photographs)
    return folder


def test_images_make_a_packed_model(folder, photos, tmp_path):
    done = run(folder, "--images", photos, "--output_dir", tmp_path / "out", "--recipe", "w1a8", "--labels")
    assert done.exit_code == 0, done.exception
    assert "fitted 12 layers to 8 images" in done.output and "left out:" in done.output
    assert done.stderr.index("│ flower") < done.stderr.index("2 left out:") and "Reading" not in done.stderr
    assert all(word in done.output for word in ("accuracy", "balanced accuracy", "bytes", "x smaller", "x as fast"))
    assert "Accuracies are of 8 images that the weights were not fitted to." in done.output
    model = ViTForImageClassification.from_pretrained(tmp_path / "out")
    stored = model.config.quantization_config
    assert (stored.state, stored.activations, stored.calibration["images"]) == ("packed", "int8", 8)
    assert model.config.id2label == {0: "flower", 1: "other", 2: "temple"}
    card = QuantizationCard.load(tmp_path / "out")
    assert (card.task, card.calibration_samples, card.labelled_samples) == ("PTQ", 8, 0)
    assert len(card.calibration_errors) == 12 and card.baseline_top1 is not None
    assert all(each["after"] < each["before"] for each in card.calibration_errors.values())
    text = (tmp_path / "out" / "README.md").read_text()
    assert "fitted in closed form to 8 images without labels, without training" in text
    shown = CliRunner().invoke(app, ["summary", str(tmp_path / "out")]).output
    assert "error" in shown and "→" in shown


@pytest.mark.parametrize("given, expected", [([], (False, False)), (["--residual"], (True, False))])
def test_what_only_training_makes_good_is_left_out(given, expected, folder, photos, tmp_path):
    done = run(folder, tmp_path / "out", "--images", photos, "--recipe", "w1a1-two-stage", "--num_images", "4", *given)
    assert done.exit_code == 0, done.exception
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stored["residual"], stored["rprelu"]) == expected and stored["calibration"]["images"] == 4


def test_a_flat_folder_of_images_will_do(folder, photos, tmp_path):
    (tmp_path / "flat").mkdir()
    for file in (photos / "train" / "temple").glob("*.jpg"):
        (tmp_path / "flat" / file.name).write_bytes(file.read_bytes())
    done = run(folder, tmp_path / "out", "--images", tmp_path / "flat")
    assert done.exit_code == 0, done.exception
    assert "to 4 images" in done.output


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (["--num_images", "4"], ConfigError, "name them, --images FOLDER"),
        (["--labels"], ConfigError, "name them, --images FOLDER"),
        (["--images", "nowhere"], DataError, "no folder and no dataset on the hub named 'nowhere'"),
        (["--images", "PHOTOS/train", "--labels"], DataError, "has one part, which the weights are fitted to"),
        (["--images", "PHOTOS", "--output_dir", "other"], ConfigError, "Name one new folder"),
    ],
)
def test_images_that_will_not_do_write_nothing(options, error, words, folder, photos, tmp_path):
    options = [each.replace("PHOTOS", str(photos)) for each in options]
    done = run(folder, tmp_path / "out", *options)
    assert isinstance(done.exception, error) and words in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_no_images_are_an_error(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run(folder, tmp_path / "out", "--images", tmp_path / "empty")
    assert isinstance(done.exception, DataError) and "holds no images" in str(done.exception)
    assert isinstance(run(folder).exception, ConfigError)
