"""Every example runs, in the small version it offers, and tells what it promises."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers import DeiTImageProcessorPil

EXAMPLES = Path(__file__).parents[1] / "examples"
RELEASE = "solar-cells-pvtv2-1bit"


@pytest.fixture(scope="module")
def solar_cells(tmp_path_factory):
    """The main example in its smoke version: output, and folder of results."""
    out = tmp_path_factory.mktemp("solar")
    command = [sys.executable, str(EXAMPLES / "finetune_solar_cells.py"), "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, out


def test_solar_cells_prints_every_row_of_the_table(solar_cells):
    """And that a process of its own, which reloaded the packed model, gave the same predictions."""
    output, _ = solar_cells
    for row in ("float, 1 epochs", "float, 2 epochs", "post-training sign", "latent, soft", "latent, hard", "packed"):
        assert row in output
    assert "the same" in output


def test_solar_cells_leaves_models_curves_and_results(solar_cells):
    _, out = solar_cells
    run = out / "fold0-seed0"
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    assert len(results) == 1
    packed, latent = results[0]["packed, reloaded"], results[0]["latent, hard (simulated)"]
    assert packed["accuracy"] == latent["accuracy"]
    assert packed["bytes"] == (run / RELEASE / "model.safetensors").stat().st_size < latent["bytes"] / 8


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ("finetune_solar_cells", ["--recipe", "w1a3"], "Unknown recipe 'w1a3'"),
        ("finetune_solar_cells", ["--weights", "bnn+++"], "Unknown quantizer pair 'bnn+++'"),
        ("finetune_solar_cells", ["--weights", "fp"], "--weights: the levels of fp are not -1 and +1"),
        ("finetune_solar_cells", ["--seeds", "0"], "--seeds must be at least 1, not 0"),
        ("finetune_solar_cells", ["--evaluate", "nowhere"], "--evaluate: nowhere holds no model"),
        ("imagenet", ["--recipe", "w1a3"], "Unknown recipe 'w1a3'"),
        ("imagenet", ["--epochs", "0"], "--epochs and --batch must be at least 1"),
        ("imagenet", ["--learning-rate", "0"], "--learning-rate above 0"),
        ("imagenet", ["--ema", "2"], "--ema from 0 to 1"),
        ("accelerate_loop", ["--steps", "0"], "--steps and --batch must be at least 1"),
        ("accelerate_loop", ["--out", __file__], "is a file; name a folder"),
    ],
)
def test_a_command_line_is_checked_before_anything_is_trained(example, options, message, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [example, *options])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(example).main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_custom_pair_is_judged_trained_and_packed(tmp_path):
    """In a few lines: fewer than 60, as its page promises."""
    example = EXAMPLES / "custom_quantizer_pair.py"
    command = [sys.executable, str(example), "--epochs", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "arctangent: P is non-decreasing" in done.stdout
    assert "the sign with the same gradient: B changes while P stands still" in done.stdout
    accuracy = float(done.stdout.split("at one bit a weight: ")[1].split()[0])
    assert 0.2 < accuracy <= 1
    assert "65,536 of 1 bit" in done.stdout
    assert len(example.read_text().splitlines()) < 60


def test_imagenet_runs_on_made_pictures(tmp_path):
    command = [sys.executable, str(EXAMPLES / "imagenet.py"), "--smoke", "--recipe", "w1a8", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of 8 pictures" in done.stdout
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (config["state"], config["activations"]) == ("packed", "int8")
    # Stopped after the first step, it goes on from there with its average, in two processes that share the stream.
    shutil.rmtree(tmp_path / "packed")
    shutil.rmtree(tmp_path / "checkpoint-2")
    (tmp_path / "average-2.safetensors").unlink()
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command[1:]]
    on_cpus = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*two, "--resume"], env=on_cpus, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "checkpoint-2").is_dir() and (tmp_path / "packed").is_dir()
    assert done.stdout.count("of 8 pictures") == 1, "three shards for two processes: each picture is met once"
    assert sorted(file.name for file in tmp_path.glob("average*")) == [f"average-{n}.safetensors" for n in (1, 2)]
    averages = [load_file(tmp_path / f"average-{n}.safetensors") for n in (1, 2)]
    assert [int(average["n_averaged"]) for average in averages] == [1, 2]
    packed, name = load_file(tmp_path / "packed" / "model.safetensors"), "classifier.weight"
    torch.testing.assert_close(packed[name], averages[1][f"module.{name}"])


def test_imagenet_trains_with_the_whole_of_a_crop(monkeypatch):
    """The processor of DeiT enlarges a picture, and cuts its edge off."""
    monkeypatch.syspath_prepend(EXAMPLES)
    imagenet = importlib.import_module("imagenet")
    white = Image.new("RGB", (64, 64), "white")
    processor = DeiTImageProcessorPil(size={"height": 256, "width": 256}, crop_size={"height": 224, "width": 224})
    monkeypatch.setattr(imagenet, "crop", lambda *_: ImageOps.expand(white.resize((208, 208)), 8, "black"))
    shown = {
        training: imagenet.prepare({"image": [white], "label": [3]}, processor, 224, training)["pixel_values"][0]
        for training in (True, False)
    }
    assert all(pixels.shape == (3, 224, 224) for pixels in shown.values())
    assert shown[False].min() == shown[True].max() == 1
    assert (shown[True] < 0).sum() == 3 * (224**2 - 208**2)


def test_digits_writes_what_the_demo_holds(tmp_path):
    command = [sys.executable, str(EXAMPLES / "train_digits.py"), "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    demo = EXAMPLES.parent / "src" / "proxbit" / "demo" / "digits"
    release = tmp_path / "digits-vit-1bit"
    assert {file.name for file in demo.iterdir()} == {file.name for file in release.iterdir()} | {"samples"}
    assert {file.name for file in demo.glob("samples/*.png")} == {file.name for file in tmp_path.glob("samples/*.png")}
    made, kept = (json.loads((folder / "config.json").read_text()) for folder in (release, demo))
    assert made["quantization_config"] == kept["quantization_config"]
