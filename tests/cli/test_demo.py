"""`proxbit demo`: what is in the package is small, free to ship, and reads digits."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

import proxbit
from proxbit.analysis.card import QuantizationCard
from proxbit.cli.app import app
from proxbit.cli.demo import FITTED, FLOAT, TRAINED, half_blocks, images_of

DEMO = Path(proxbit.__file__).parent / "demo"


@pytest.fixture(scope="module")
def found():
    done = CliRunner().invoke(app, ["demo", "--json"])
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


def test_it_is_small():
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) < 500_000
    config = json.loads((DEMO / "digits" / "config.json").read_text())
    assert config["quantization_config"]["state"] == "packed"


def test_ten_digits_are_read(found):
    readings = found["readings"]
    assert [reading["truth"] for reading in readings] == list("0123456789")
    assert sum(reading["prediction"] == reading["truth"] for reading in readings) >= 9
    assert all(0.1 < reading["certainty"] <= 1 for reading in readings)


def test_it_is_binarized_on_the_spot(found):
    """From images without labels; nearly as good as float, and as small as the one that was trained."""
    plain, fitted, trained = (found["forms"][name] for name in (FLOAT, FITTED, TRAINED))
    assert found["unlabelled"] == 256 and found["test"] == 360 and found["seconds"] > 0
    assert plain["accuracy"] > 0.94 and min(fitted["accuracy"], trained["accuracy"]) > plain["accuracy"] - 0.03
    assert fitted["bytes"] == trained["bytes"] < (DEMO / "digits" / "model.safetensors").stat().st_size
    assert plain["bytes"] > 10 * fitted["bytes"]
    assert all(form["latency_ms"] > 0 for form in found["forms"].values())


def test_pictures_on_the_sheets_are_digits_that_are_no_samples():
    """None of the test images is among those that weights are fitted to."""
    digits = load_digits()
    drawn = np.clip(255 - 16 * digits.images, 0, 255).astype(np.uint8)
    known = {each.tobytes(): label for each, label in zip(drawn, digits.target, strict=True)}
    sheets = {}
    for name in ("unlabelled", "test"):
        images = images_of(DEMO / "digits-float" / f"{name}.png", 8)
        sheets[name] = [np.asarray(each.convert("L")).tobytes() for each in images]
    labels = (DEMO / "digits-float" / "test.txt").read_text().strip()
    assert [str(known[each]) for each in sheets["test"][: len(labels)]] == list(labels)
    assert len(set(sheets["unlabelled"])) == 256 and not set(sheets["unlabelled"]) & set(sheets["test"][: len(labels)])


def test_the_samples_are_digits_of_scikit_learn():
    digits = load_digits()
    drawn = np.clip(255 - 16 * digits.images, 0, 255).astype(np.uint8)
    for path in (DEMO / "digits" / "samples").glob("*.png"):
        same = (drawn == np.asarray(Image.open(path))).all(axis=(1, 2))
        assert {str(label) for label in digits.target[same]} == {path.stem}


def test_licence_and_maker_are_named():
    text = (DEMO / "digits" / "samples" / "README.md").read_text()
    assert all(words in text for words in ("CC BY 4.0", "Alpaydin", "python examples/train_digits.py", "model_cards/"))


def test_it_is_a_release_and_its_card_is_among_the_model_cards(found):
    card = QuantizationCard.load(DEMO / "digits")
    tested = {name: found["forms"][name]["accuracy"] for name in (FLOAT, TRAINED)}
    assert tested[TRAINED] == pytest.approx(card.quantized_top1, abs=1e-6)
    assert tested[FLOAT] == pytest.approx(card.baseline_top1, abs=0.006)  # which was in fp32, and not in bf16
    cards = Path(__file__).parents[2] / "model_cards"
    assert (cards / "digits-vit-1bit.md").read_text() == (DEMO / "digits" / "README.md").read_text()


def test_two_pixels_are_one_character():
    image = Image.fromarray(np.array([[0, 255, 0, 255], [0, 255, 255, 0]], dtype=np.uint8))
    assert half_blocks(image, colors=False).plain == "█ ▀▄\n"
    styled = half_blocks(image, colors=True)
    assert styled.plain == "▀▀▀▀\n"
    shades = [(span.style.color.triplet.red, span.style.bgcolor.triplet.red) for span in styled.spans]
    assert shades == [(0, 0), (255, 255), (0, 255), (255, 0)]


def test_in_a_pipe_pictures_are_ink_on_paper():
    shown = CliRunner().invoke(app, ["demo"], env={"COLUMNS": "80"}).stdout
    assert "\x1b" not in shown and "██" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "images without labels" in shown and "smaller" in shown
