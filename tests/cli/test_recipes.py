"""`proxbit recipes`, as a table and as JSON."""

import json

from typer.testing import CliRunner

from proxbit.cli.app import app
from proxbit.training import RECIPES


def test_every_recipe_is_listed():
    done = CliRunner().invoke(app, ["recipes"], env={"COLUMNS": "120"})
    assert done.exit_code == 0
    assert all(name in done.output for name in RECIPES if not name.startswith("test-"))
    assert "activations='int8'" in done.output


def test_as_json():
    done = CliRunner().invoke(app, ["recipes", "--json"])
    found = json.loads(done.output)
    assert list(found) == list(RECIPES)
    assert found["w1a8"]["config"] == {"weights": "bnn++", "activations": "int8"}
