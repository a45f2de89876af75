"""`proxbit binarize`: recipes and fields of the configuration, and what is refused."""

import inspect
import json
from dataclasses import fields

import pytest
from typer.testing import CliRunner

import proxbit
from picture_folders import tiny_classifier
from proxbit.cli.app import app
from proxbit.cli.binarize import binarize
from proxbit.errors import CheckpointError, ConfigError, PatternError, UnknownNameError


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
