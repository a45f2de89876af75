"""`proxbit env`."""

import json

import torch
from typer.testing import CliRunner

import proxbit
from proxbit.cli.app import app
from proxbit.kernels import native


def test_it_shows_what_runs():
    result = CliRunner().invoke(app, ["env"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    rows = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in map(str.rstrip, result.output.splitlines())}
    assert rows["proxbit"] == proxbit.__version__ and rows["torch"] == torch.__version__
    assert rows["kernel level"] == ("reference" if native() is None else native().name)
    assert rows["kernel level"] in rows["levels available"]
    assert {"transformers", "python", "CPU", "cores", "threads", "kernel library", "PROXBIT_ISA"} <= set(rows)


def test_the_reference_comes_with_one_line_of_advice(monkeypatch):
    native.cache_clear()
    monkeypatch.setenv("PROXBIT_ISA", "reference")
    result = CliRunner().invoke(app, ["env"], env={"COLUMNS": "80"})
    native.cache_clear()
    assert result.exit_code == 0
    assert result.output.splitlines()[-1].startswith("Packed layers run on the plain torch reference")


def test_as_json():
    found = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    assert found["torch"] == torch.__version__ and found["kernel level"] in found["levels available"]
