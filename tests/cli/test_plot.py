"""`proxbit plot`."""

import re
import sys

import pytest
from typer.testing import CliRunner

from proxbit.cli.app import app, main
from proxbit.errors import ConfigError, MuRangeError


def run(*arguments):
    return CliRunner().invoke(app, ["plot", *arguments])


def test_a_picture_beside_the_caller(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("bnn++")
    assert result.exit_code == 0
    assert result.output == "Wrote bnn++.png\n"
    assert (tmp_path / "bnn++.png").read_bytes().startswith(b"\x89PNG")


def test_mu_and_parameters_reach_the_picture(tmp_path):
    path = tmp_path / "ternary.svg"
    result = run("pc", "--out", str(path), "--mu", "0.125", "--mu", "0.4", "--parameters", '{"levels": [-1, 0, 1]}')
    assert result.exit_code == 0
    text = path.read_text()
    assert all(words in text for words in ("mu = 0.125", "mu = 0.4", "levels", "[-1, 0, 1]", "(sound)"))


def test_a_folder_in_the_place_of_the_picture(tmp_path, monkeypatch, capsys):
    """One line on standard error, and nothing is written."""
    monkeypatch.setattr(sys, "argv", ["proxbit", "plot", "bnn++", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert re.fullmatch(r"Error: .* is a folder; name the image in it, such as .*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("bnn++", "--parameters", "{levels"), ConfigError, "must be JSON"),
        (("pc", "--parameters", "[1]"), ConfigError, "must be a JSON object"),
        (("bc", "--parameters", '{"levels": [0, 1]}'), ConfigError, "takes no parameters"),
        (("parq", "--mu", "0.5"), MuRangeError, "mu = 0.5 is out of range"),
    ],
    ids=["not json", "no object", "no parameters", "mu"],
)
def test_refusals_write_nothing(tmp_path, arguments, error, words):
    result = run(*arguments, "--out", str(tmp_path / "x.png"))
    assert isinstance(result.exception, error)
    assert words in str(result.exception)
    assert list(tmp_path.iterdir()) == []
