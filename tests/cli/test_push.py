"""`proxbit push`, to the Hub of the tests."""

import sys

import pytest
from transformers import ViTForImageClassification
from typer.testing import CliRunner

import proxbit
from hub_server import Fault
from proxbit.cli.app import app, main
from tiny_models import vit


@pytest.fixture
def folder(tmp_path):
    model = proxbit.pack(proxbit.binarize(ViTForImageClassification(vit())))
    model.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def refusal(monkeypatch, capsys, *arguments):
    """What `proxbit push` says on standard error, and that it says nothing else."""
    monkeypatch.setattr(sys, "argv", ["proxbit", "push", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("Error: ") and "\n" not in error
    return error


def test_it_says_what_it_uploads_how_much_and_where(hub, folder):
    result = CliRunner().invoke(app, ["push", str(folder), "me/tiny"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    files = hub.hub.repositories["me/tiny"].files()
    listed = dict(map(str.strip, line.split(maxsplit=1)) for line in result.output.splitlines()[:4])
    assert listed.keys() == files.keys() - {".gitattributes"}
    weights = len(files["model.safetensors"])
    assert listed["model.safetensors"] == f"{weights / 1000:.1f} kB"
    total = sum(len(files[name]) for name in listed)
    assert f"packed, 4 files, {total / 1000:.1f} kB, to {hub.url}/me/tiny\n" in result.output
    assert f"uploaded: {hub.url}/me/tiny/commit/{hub.hub.repositories['me/tiny'].branches['main']}" in result.output


def test_its_options(hub, folder, monkeypatch):
    hub.sign_in(monkeypatch, None)
    options = ["--private", "--revision", "next", "--token", "hf_me"]
    result = CliRunner().invoke(app, ["push", str(folder), "tiny", *options])
    assert result.exit_code == 0, result.output
    assert hub.hub.repositories["me/tiny"].private
    assert "config.json" in hub.hub.repositories["me/tiny"].files("next")
    assert f"{hub.url}/me/tiny/tree/next" in result.output


def test_a_latent_model_only_when_asked(hub, tmp_path, monkeypatch, capsys):
    proxbit.binarize(ViTForImageClassification(vit())).save_pretrained(tmp_path / "latent")
    assert "--latent" in refusal(monkeypatch, capsys, tmp_path / "latent", "me/tiny")
    assert hub.log == []
    result = CliRunner().invoke(app, ["push", str(tmp_path / "latent"), "me/tiny", "--latent"])
    assert result.exit_code == 0 and "latent, 4 files" in result.output


def test_faults_are_one_line(hub, folder, tmp_path, monkeypatch, capsys):
    ViTForImageClassification(vit()).save_pretrained(tmp_path / "float")
    assert "there is no config.json" in refusal(monkeypatch, capsys, tmp_path / "nowhere", "me/tiny")
    assert "is float, not one of proxbit" in refusal(monkeypatch, capsys, tmp_path / "float", "me/tiny")
    assert "(403)" in refusal(monkeypatch, capsys, folder, "other/tiny")
    hub.faults = [Fault("POST", "/commit/", status=500)]
    assert "the Hub failed (500). Run the same again" in refusal(monkeypatch, capsys, folder, "me/tiny")
