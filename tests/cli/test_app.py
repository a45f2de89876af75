"""The program as a whole: its commands, and how it refuses."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from proxbit.cli.app import app, main


def test_help_names_the_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "pairs" in result.output and "plot" in result.output


def test_a_refusal_is_one_line_and_exit_status_2(monkeypatch, capsys, tmp_path):
    """Brackets in the message are text, not markup."""
    monkeypatch.setattr(sys, "argv", ["proxbit", "plot", "[red]bnn+++", "--out", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "Error: Unknown quantizer pair '[red]bnn+++'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_program_is_installed():
    from_script = subprocess.run(
        [sys.executable, "-c", "from proxbit.cli import main; main()", "plot", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "regularizer" in from_script.stdout
