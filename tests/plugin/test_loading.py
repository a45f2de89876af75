"""A stranger's folder names code of its own in every way that transformers knows; no command runs it, or asks."""

import contextlib
import json

import pytest
import transformers as hf
from PIL import Image
from typer.testing import CliRunner

import proxbit
from proxbit.cli.app import app
from proxbit.errors import ProxbitError
from proxbit.hub.push import prepare_upload
from proxbit.plugin.loading import class_of
from proxbit_cli import COMMANDS
from tiny_models import SIDE, vit

CODE = """\
from pathlib import Path
import transformers
Path({mark!r}).touch()
class EvilConfig(transformers.PreTrainedConfig):
    model_type = "evil"
class EvilModel(transformers.PreTrainedModel):
    config_class = EvilConfig
class EvilProcessor(transformers.ViTImageProcessorPil):
    pass
"""
AUTO = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModel": "evil.EvilModel",
    "AutoModelForImageClassification": "evil.EvilModel",
    "AutoBackbone": "evil.EvilModel",
    "AutoImageProcessor": "evil.EvilProcessor",
    "AutoProcessor": "evil.EvilProcessor",
}
# What `config.json` says instead, and `preprocessor_config.json`: the code is that of the configuration, of the model,
# of a part of the model, or of the processor.
KINDS = {
    "configuration": ({"model_type": "evil", "architectures": ["EvilModel"], "auto_map": AUTO}, {}),
    "model": ({"architectures": ["EvilModel"], "auto_map": AUTO}, {}),
    "model of a text": ({"model_type": "t5", "architectures": [], "auto_map": AUTO, "quantization_config": None}, {}),
    "backbone": (
        {
            "model_type": "upernet",
            "architectures": ["UperNetForSemanticSegmentation"],
            "backbone_config": {"model_type": "bert", "auto_map": AUTO},
        },
        {},
    ),
    "processor": ({}, {"image_processor_type": "EvilProcessor", "auto_map": AUTO}),
    "processor in the configuration": ({"auto_map": AUTO}, {"image_processor_type": "EvilProcessor"}),
}
# The commands that load a model, with {} for the folder. The others load none, or the one that comes with proxbit.
LOADING = {
    "bench": ["bench {packed} --rounds 1", "bench {latent} --random --rounds 1"],
    "binarize": ["binarize {float} out", "binarize {float} --images data --output_dir out"],
    "card": ["card {packed}", "card {float} --against {latent}"],
    "evaluate": ["evaluate {packed} data"],
    "pack": ["pack {latent} out"],
    "push": ["push {packed} me/tiny", "push {latent} me/tiny --latent"],
    "summary": ["summary {packed}", "summary {float} --json"],
    "train": [
        "train --model {float} --data data --output_dir out --report_to nobody",
        "train --model good --teacher {float} --data data --output_dir out --report_to nobody",
    ],
    "unpack": ["unpack {packed} out"],
}
QUICK = ("configuration", "backbone")
LOADING_NONE = {"demo", "env", "pairs", "plot", "recipes", "report"}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A float, a latent and a packed model, each with its processor; and two pictures."""
    folder = tmp_path_factory.mktemp("originals")
    model = hf.ViTForImageClassification(vit(num_labels=2, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}))
    model.save_pretrained(folder / "float")
    proxbit.binarize(model).save_pretrained(folder / "latent")
    proxbit.pack(model).save_pretrained(folder / "packed")
    for name in ("float", "latent", "packed"):
        hf.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / name)
    for name in ("a", "b"):
        for place in ("train", "test"):
            picture = folder / "data" / place / name / "1.png"
            picture.parent.mkdir(parents=True)
            Image.new("RGB", (SIDE, SIDE)).save(picture)
    return folder


@pytest.fixture
def mark(tmp_path, monkeypatch, copied_modules):
    """The file that the code leaves wherever it runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mark"


def spoil(originals, tmp_path, mark, kind):
    """Copies of the three models, with the code."""
    (tmp_path / "good").symlink_to(originals / "float")
    (tmp_path / "data").symlink_to(originals / "data")
    for name in ("float", "latent", "packed"):
        folder = tmp_path / f"evil-{name}"
        folder.mkdir()
        for file in (originals / name).iterdir():
            changes = dict(zip(("config.json", "preprocessor_config.json"), KINDS[kind])).get(file.name)
            text = file.read_bytes()
            if changes is not None:
                text = json.dumps(json.loads(text) | changes).encode()
            (folder / file.name).write_bytes(text)
        (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    return {name: f"evil-{name}" for name in ("float", "latent", "packed")}


def test_every_command_is_looked_at():
    assert LOADING.keys() | LOADING_NONE == COMMANDS.keys()


# Every line with code of the configuration and of a backbone, which end early, and one kind that goes further; the
# commands that prepare images with code of the processor; one command with all kinds.
LATE = [kind for kind in KINDS if kind not in QUICK]
CASES = [(line, [*QUICK, LATE[i % len(LATE)]]) for i, lines in enumerate(LOADING.values()) for line in lines]
PROCESSOR = ["processor", "processor in the configuration"]
CASES += [(LOADING[name][-1], PROCESSOR) for name in ("binarize", "evaluate", "train", "push")]
CASES += [("summary {float}", list(KINDS))]


@pytest.mark.parametrize(("line", "kinds"), CASES)
def test_no_command_runs_it_or_asks(originals, tmp_path, mark, hub, monkeypatch, line, kinds):
    """Even with somebody there who says yes to whatever is asked."""
    for kind in kinds:
        (place := tmp_path / kind).mkdir()
        monkeypatch.chdir(place)
        folders = spoil(originals, place, mark, kind)
        done = CliRunner().invoke(app, line.format(**folders).split(), input="y\n" * 9)
        assert not mark.exists() and "[y/N]" not in done.output, kind
        assert done.exit_code == 0 or isinstance(done.exception, ProxbitError), repr(done.exception)


@pytest.mark.parametrize("kind", KINDS)
def test_no_function_does(originals, tmp_path, mark, hub, kind):
    folders = spoil(originals, tmp_path, mark, kind)
    model = proxbit.binarize(hf.ViTForImageClassification.from_pretrained(originals / "float"))
    model.config.name_or_path = folders["float"]
    with pytest.raises(ProxbitError) if "processor" in kind else contextlib.nullcontext():
        proxbit.calibrate(model, [Image.new("RGB", (SIDE, SIDE))], progress=False)
    with contextlib.suppress(ProxbitError), prepare_upload(folders["packed"], "me/tiny"):
        pass
    assert not mark.exists()


def test_the_code_would_run(originals, tmp_path, mark):
    """The control: told to, transformers does run it."""
    folders = spoil(originals, tmp_path, mark, "configuration")
    hf.AutoConfig.from_pretrained(folders["float"], trust_remote_code=True)
    assert mark.exists()


def test_the_class_that_a_configuration_names(originals, tmp_path):
    """Something else than a class of a model is refused, and a class that nobody knows is none."""
    config = json.loads((originals / "float" / "config.json").read_text())
    strange = (
        ["ViTConfig"],
        ["AutoModel"],
        ["no.X"],
        ["\x1b[2J"] * 2,
        [3],
        {"a": 1},
        True,
        "ViTForImageClassification",
    )
    for names in strange:
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": names}))
        done = CliRunner().invoke(app, ["summary", str(tmp_path)])
        assert isinstance(done.exception, ProxbitError) and str(done.exception).isprintable(), names
    assert class_of(vit(architectures=["NobodysViT"]), "m") is None
