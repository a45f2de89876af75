"""`proxbit pairs`."""

import json

from typer.testing import CliRunner

from proxbit.cli.app import app
from proxbit.quantizers import PAIRS


def test_the_table_has_every_pair_with_its_verdict():
    result = CliRunner().invoke(app, ["pairs"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    rows = [row.replace("\n", " ") for row in result.output.split("├")]
    assert len(rows) == len(PAIRS)
    for name, row in zip(PAIRS, rows, strict=True):
        assert f"│ {name} " in row
        assert ("sound" in row) == PAIRS.get(name).sound
        assert ("heuristic" in row) == (not PAIRS.get(name).sound)


def test_a_narrow_terminal_still_shows_every_name():
    result = CliRunner().invoke(app, ["pairs"], env={"COLUMNS": "80"})
    assert all(f"│ {name} " in result.output for name in PAIRS)
    assert max(map(len, result.output.splitlines())) <= 80


def test_as_json():
    found = json.loads(CliRunner().invoke(app, ["pairs", "--json"]).stdout)
    assert {row["name"]: row["sound"] for row in found} == {name: PAIRS.get(name).sound for name in PAIRS}


def test_no_link_is_cut_off():
    assert "…" not in CliRunner().invoke(app, ["pairs"], env={"COLUMNS": "80"}).output
