"""`proxbit summary`, as a table and as JSON."""

import json

import pytest
from typer.testing import CliRunner

import proxbit
from picture_folders import tiny_classifier
from proxbit.cli.app import app
from proxbit.cli.checkpoints import load_model


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = load_model(str(tiny_classifier(folder / "float")))
    proxbit.pack(proxbit.binarize(model)).save_pretrained(folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize(
    ("width", "columns"),
    [(80, ["MACs", "In 120 columns also: bits"]), (140, ["1-bit MACs", "float MACs", "kernel", "bits"])],
)
def test_the_table_fits_the_terminal(packed, width, columns):
    done = CliRunner().invoke(app, ["summary", str(packed)], env={"COLUMNS": str(width)})
    assert done.exit_code == 0, done.exception
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= width
    assert all(column in done.output for column in columns)
    assert any("mlp.fc1 ×2" in line and "packed" in line for line in lines)


def test_json_holds_what_the_table_does(packed):
    found = json.loads(CliRunner().invoke(app, ["summary", str(packed), "--json"]).stdout)
    assert found["state"] == "packed" and found["model"] == "ViTForImageClassification"
    assert found["binary_parameters"] == sum(layer["binary_parameters"] for layer in found["layers"])
    assert found["file_bytes"] == found["packed_bytes"] < found["float32_bytes"]
