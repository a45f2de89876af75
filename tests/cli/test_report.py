"""`proxbit report`."""

import re
import sys

import pytest
from typer.testing import CliRunner

from proxbit.cli.app import app, main
from run_folder import write_run


def test_a_page_in_the_folder_of_the_run_or_elsewhere(tmp_path):
    run = write_run(tmp_path / "run")
    result = CliRunner().invoke(app, ["report", str(run)])
    assert (result.exit_code, result.output) == (0, f"Wrote {run / 'report.html'}\n")
    other = tmp_path / "other.html"
    assert CliRunner().invoke(app, ["report", str(run), "--out", str(other)]).exit_code == 0
    assert other.read_text() == (run / "report.html").read_text()


@pytest.mark.parametrize("name", ["empty", "nowhere", "file"])
def test_a_folder_of_no_run_is_one_line_and_exit_status_2(tmp_path, name, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["proxbit", "report", str(tmp_path / name)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert re.fullmatch(r"Error: .* is not the output folder of a run: .*\n", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file"]
