"""`proxbit pack`, and what it refuses."""

import resource
import sys

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import proxbit
from picture_folders import tiny_classifier
from proxbit.cli.app import app, main
from proxbit.cli.checkpoints import load_model
from proxbit.errors import CheckpointError, ModelStateError


@pytest.fixture
def latent(tmp_path):
    model = load_model(str(tiny_classifier(tmp_path / "float")))
    proxbit.binarize(model).save_pretrained(tmp_path / "latent")
    return tmp_path / "latent"


def run(*arguments):
    return CliRunner().invoke(app, ["pack", *map(str, arguments)])


def test_signs_and_nothing_else_are_packed(latent, tmp_path):
    done = run(latent, tmp_path / "packed")
    assert done.exit_code == 0, done.exception
    assert "packed 12 of 14 modules" in done.output and f"Wrote {tmp_path / 'packed'}" in done.output
    weight, packed = load_file(latent / "model.safetensors"), load_file(tmp_path / "packed" / "model.safetensors")
    key = next(key for key in weight if key.endswith("fc1.weight") or key.endswith("intermediate.dense.weight"))
    bits = (packed[key].unsqueeze(-1) >> torch.arange(8)) & 1
    assert torch.equal(bits.flatten(1)[:, : weight[key].shape[1]].bool(), weight[key] >= 0)


def test_the_model_answers_as_before(latent, tmp_path, crops):
    run(latent, tmp_path / "packed")
    before, after = load_model(str(latent)), load_model(str(tmp_path / "packed"))
    with torch.no_grad():
        torch.testing.assert_close(after(crops(2, 32)).logits, before(crops(2, 32)).logits)


def test_refusals_write_nothing(latent, tmp_path):
    assert isinstance(run(tmp_path / "float", tmp_path / "out").exception, ModelStateError)
    assert isinstance(run(tmp_path / "nowhere", tmp_path / "out").exception, CheckpointError)
    assert not (tmp_path / "out").exists()
    before = {file: file.read_bytes() for file in latent.iterdir()}
    refused = run(latent, latent).exception
    assert isinstance(refused, CheckpointError) and "nothing is overwritten" in str(refused)
    assert {file: file.read_bytes() for file in latent.iterdir()} == before


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_a_full_disk_is_one_line(latent, tmp_path, monkeypatch, capsys, command):
    """Which is here a limit of the size of files."""
    monkeypatch.setattr(sys, "argv", ["proxbit", command, str(latent), str(tmp_path / "out")])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("Error: ") and "too large" in error
    assert {path.name for path in tmp_path.iterdir()} == {"float", "latent"}
