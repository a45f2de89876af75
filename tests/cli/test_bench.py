"""`proxbit bench`, on tiny models. No test depends on how fast a machine is."""

import json
import re

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import proxbit
from proxbit.analysis.timing import Timings
from proxbit.cli.app import app
from proxbit.cli.bench import load, table_of
from proxbit.errors import CheckpointError
from proxbit.patching import state_of
from tiny_models import vit


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments), "--rounds", "1"], env={"COLUMNS": "200"})


def rows_of(output):
    """The cells of each row, by variant."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {cells[0]: cells[1:] for cells in lines}


@pytest.fixture
def architecture():
    """A configuration that names its class, as `save_pretrained` of a model writes it."""
    return vit(architectures=["ViTForImageClassification"])


def test_a_float_model_is_timed_in_every_precision(tmp_path):
    hf.ViTForImageClassification(vit()).save_pretrained(tmp_path)
    threads = torch.get_num_threads()
    result = run(tmp_path, "--batch", 2, "--threads", 1)
    assert result.exit_code == 0, result.output
    rows = rows_of(result.output)
    assert list(rows) in (
        ["float", "bf16", "int8 dynamic", "packed, float"],
        ["float", "bf16", "packed, float"],
    )
    for milliseconds, spread, ratio, *shares in rows.values():
        assert float(milliseconds) > 0 and float(ratio) > 0 and re.fullmatch(r"\d+%", spread)
        assert sum(int(share.rstrip("%")) for share in shares) == pytest.approx(100, abs=2)
    assert rows["float"][2] == "1.00"
    assert "ViTForImageClassification, batch 2, threads 1" in result.output
    assert torch.get_num_threads() == threads


def test_a_packed_model_is_timed_with_its_own_activations(tmp_path):
    model = hf.ViTForImageClassification(vit())
    config = proxbit.BinarizationConfig(activations="sign")
    proxbit.pack(proxbit.binarize(model, config)).save_pretrained(tmp_path)
    rows = rows_of(run(tmp_path).output)
    assert "packed, sign" in rows and "packed, float" not in rows


def test_a_configuration_is_enough_with_random_weights(tmp_path, architecture):
    architecture.save_pretrained(tmp_path)
    assert "packed, float" in rows_of(run(tmp_path, "--random").output)
    with pytest.raises(CheckpointError, match="--random"):
        load(str(tmp_path), random=False)


def test_random_weights_of_a_packed_configuration_are_packed(tmp_path):
    model = hf.ViTForImageClassification(vit())
    proxbit.pack(proxbit.binarize(model, proxbit.BinarizationConfig(activations="int8"))).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    made = load(str(tmp_path), random=True)
    assert state_of(made) == "packed" and made.config.quantization_config.activations == "int8"


def test_a_configuration_without_a_class_becomes_a_classifier(tmp_path):
    vit().save_pretrained(tmp_path)
    assert type(load(str(tmp_path), random=True)) is hf.ViTForImageClassification


def test_pickled_weights_are_not_read(tmp_path, architecture):
    architecture.save_pretrained(tmp_path)
    torch.save(hf.ViTForImageClassification(vit()).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        load(str(tmp_path), random=False)


def test_a_missing_folder_is_refused(tmp_path):
    result = run(tmp_path / "nowhere")
    assert isinstance(result.exception, CheckpointError)
    assert f"There is no model '{tmp_path / 'nowhere'}'" in str(result.exception)


@pytest.mark.parametrize("option", ["--batch", "--threads", "--rounds"])
def test_counts_below_one_are_refused(tmp_path, option):
    result = CliRunner().invoke(app, ["bench", str(tmp_path), option, "0"])
    assert result.exit_code == 2


def test_the_table_is_what_was_measured():
    timings = Timings({"float": (0.2, 0.4), "packed, sign": (0.1, 0.1)})
    shares = {name: {"linear": 0.5, "attention": 0.2, "GELU": 0.1, "rest": 0.2} for name in timings.seconds}
    table = table_of(timings, shares)
    cells = [list(column.cells) for column in table.columns]
    assert [column[1] for column in cells] == ["[bold]packed, sign[/]", "100.00", "0%", "3.00", "50%", "20%", "30%"]
    assert [column[0] for column in cells][1:4] == ["300.00", "33%", "1.00"]


def test_as_json(tmp_path, architecture):
    architecture.save_pretrained(tmp_path)
    found = json.loads(run(tmp_path, "--random", "--json").stdout)
    assert found["model"] == "ViTForImageClassification"
    packed = found["variants"]["packed, float"]
    assert packed["ms"] > 0 and packed["times_as_fast_as_float"] > 0
    assert sum(packed["shares"].values()) == pytest.approx(1)
