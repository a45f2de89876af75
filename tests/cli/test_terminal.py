"""What a stranger's files hold reaches no terminal as it is: through no command, and through no library."""

import json
import subprocess
import sys

import pytest
import transformers as hf
from typer.testing import CliRunner

import proxbit
from proxbit.analysis.card import CARD_NAME
from proxbit.cli.app import app, main
from proxbit.hub.release import write_release
from tiny_models import vit

HOSTILE = "\x1b[2J\x1b]0;x\x07\nError: all is lost\u202e\x9b[bold]x[/][/nothing]\ud800"


def fit(text):
    """Whether a terminal obeys nothing in it."""
    return all(each.isprintable() or each == "\n" for each in text) and "\nError: all" not in text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A packed model, of which labels, card and fields of the configuration say what they should not."""
    folder = tmp_path_factory.mktemp("hostile") / "vit"
    model = proxbit.pack(proxbit.binarize(hf.ViTForImageClassification(vit())))
    write_release(model, folder, run={"dataset": "x", "calibration_samples": 3})
    hf.ViTImageProcessorPil().save_pretrained(folder)
    card = json.loads((folder / CARD_NAME).read_text())
    card |= {
        "model_id": HOSTILE,
        "seeds": [3],
        "activation_symmetry": [HOSTILE],
        "mixed_precision_policy": {HOSTILE: 1},
    }
    card |= {"calibration_errors": {HOSTILE: {"before": 1.0, "after": 0.5}}}
    (folder / CARD_NAME).write_text(json.dumps(card))
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": HOSTILE, "1": "b", "2": "c"}, HOSTILE: HOSTILE, "transformers_version": HOSTILE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("line", ["card", "card --json", "summary", "summary --json", "bench --rounds 1", "unpack"])
def test_no_command_prints_it(hostile, tmp_path, line):
    name, *options = line.split()
    out = [str(tmp_path / "out")] if name == "unpack" else []
    done = CliRunner().invoke(app, [name, str(hostile), *out, *options])
    assert done.exit_code == 0 and fit(done.output), repr(done.output)


def test_an_upload_prints_none_of_it(hostile, hub):
    """And the card that is uploaded is text."""
    (hostile / "a\x1b[2J\nError: all.txt").touch()
    done = CliRunner().invoke(app, ["push", str(hostile), "me/tiny"])
    (hostile / "a\x1b[2J\nError: all.txt").unlink()
    assert done.exit_code == 0 and fit(done.output), repr(done.output)


FIELDS = {
    "config.json": ["model_type", "architectures", "quantization_config", "hidden_size", "id2label", "image_size"],
    CARD_NAME: ["card_format", "model_id", "total_bits", HOSTILE],
}


VALUES = [HOSTILE, [HOSTILE], {HOSTILE: HOSTILE}]
# Text, a list and a table in turn.
PLACES = [
    (file, field, VALUES[i % 3])
    for i, (file, field) in enumerate((file, field) for file in FIELDS for field in FIELDS[file])
]


@pytest.mark.parametrize(("file", "field", "value"), PLACES)
def test_no_refusal_prints_it(hostile, tmp_path, monkeypatch, capsys, file, field, value):
    """Whatever field it stands in."""
    for each in hostile.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    values = json.loads((tmp_path / file).read_text()) | {field: value}
    (tmp_path / file).write_text(json.dumps(values))
    monkeypatch.setattr(sys, "argv", ["proxbit", "summary", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert ended.value.code in (0, 2) and fit(told.out) and fit(told.err), repr(told)


def test_libraries_are_guarded():
    """Logs of transformers, and warnings, as a process of its own prints them while a command runs."""
    code = (
        "import logging, sys, warnings, proxbit_cli; from proxbit.cli.terminal import guard_terminal as guard\n"
        "guard(); guard(); proxbit_cli.app = lambda: exec(sys.argv[1]); proxbit_cli.main()"
    )
    told = f"logging.getLogger('transformers.x').warning({HOSTILE[:-1]!r}); warnings.warn({HOSTILE[:-1]!r})"
    done = subprocess.run([sys.executable, "-c", code, told], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count(r"\x1b[2J") == 2 and "\x1b" not in done.stderr
