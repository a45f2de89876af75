"""What belongs to a release: files by name, code that is named, links that stay where they are."""

import importlib
import json
import sys

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import proxbit
from proxbit.checkpoint.files import CARD_NAME
from proxbit.cli.app import app
from proxbit.errors import CheckpointError
from proxbit.hub.push import prepare_upload
from proxbit.hub.release import write_release
from proxbit.hub.release_files import code_files, is_release_file

NET = """\
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from .tinyparts import stack

class TinyNetConfig(PreTrainedConfig):
    model_type = "tinynet"

class TinyNet(PreTrainedModel):
    config_class = TinyNetConfig
    main_input_name = "pixel_values"
    def __init__(self, config):
        super().__init__(config)
        self.parts = stack()
        self.classifier = torch.nn.Linear(24, config.num_labels)
        self.post_init()
    def forward(self, pixel_values):
        return self.classifier(self.parts(pixel_values.flatten(1)))
"""
PARTS = "import torch\ndef stack(): return torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.Linear(24, 24))\n"


@pytest.fixture
def tinynet(tmp_path, monkeypatch):
    """A packed model with code of its own, in two modules."""
    package = tmp_path / "code" / "own"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "tinynet.py").write_text(NET)
    (package / "tinyparts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    net = importlib.import_module("own.tinynet")
    net.TinyNetConfig.register_for_auto_class()
    net.TinyNet.register_for_auto_class("AutoModelForImageClassification")
    yield proxbit.pack(proxbit.binarize(net.TinyNet(net.TinyNetConfig(num_labels=3))))
    for name in [name for name in sys.modules if name.partition(".")[0] == "own"]:
        del sys.modules[name]


OF_ITS_OWN = {"README.md", "config.json", "model.safetensors", "quantization_card.json", "tinynet.py", "tinyparts.py"}


def test_a_model_with_code_of_its_own(tinynet, tmp_path, hub, copied_modules):
    """It is written, replaced, uploaded whole, and loaded by whoever trusts it."""
    for _ in range(2):
        folder = write_release(tinynet, tmp_path / "release")
    (folder / "diary.py").write_text("secret")
    for source in (folder, tinynet):
        with prepare_upload(source, "me/tiny") as planned:
            assert planned.files.keys() == OF_ITS_OWN and "diary.py" not in planned.files
    with pytest.raises(CheckpointError, match=r"something else than a release of proxbit \(diary.py\)"):
        write_release(tinynet, folder)
    proxbit.push(folder, "me/tiny")
    again = hf.AutoModelForImageClassification.from_pretrained("me/tiny", trust_remote_code=True)
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(again(x), tinynet.eval()(x))


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message), prepare_upload(folder, "me/x"):
        pass


@pytest.mark.parametrize("name", ["tinynet.py", "tinyparts.py"])
def test_an_upload_without_the_code_is_refused(tinynet, tmp_path, name):
    folder = write_release(tinynet, tmp_path / "release")
    (folder / name).unlink()
    refused(folder, rf"{name} is not in .*could not be loaded")


MAPS = [
    ({"AutoModel": "a.B", "AutoConfig": "a.C", "AutoTokenizer": ["b.C", None]}, {"a.py", "b.py"}),
    ({"AutoModel": "other/repo--a.B"}, set()),
    ({"AutoModel": 3, "AutoConfig": {"a": "b"}}, set()),
    (["a.B"], set()),
    ({"AutoModel": "../secret.B"}, None),
    ({"AutoModel": "/etc/passwd"}, None),
    ({"AutoModel": ""}, None),
]


def test_what_a_map_names(tmp_path):
    for auto_map, found in MAPS:
        (tmp_path / "config.json").write_text(json.dumps({"vision_config": [{"auto_map": auto_map}]}))
        if found is None:
            with pytest.raises(CheckpointError, match=r"config.json names '.*' \(auto_map\), which is no class"):
                code_files(tmp_path)
        else:
            assert code_files(tmp_path).keys() == found


NO_CODE = ["from .a import", "\0", "(" * 10**5]


def test_code_that_is_none(tmp_path):
    for text in NO_CODE:
        (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "a.B"}}))
        (tmp_path / "a.py").write_text(text)
        with pytest.raises(CheckpointError, match="a.py cannot be read as Python"):
            code_files(tmp_path)


def test_what_tokenizers_and_processors_write_belongs_to_a_release(tmp_path):
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=hf.BertTokenizer()._tokenizer, chat_template="x")
    tokenizer.save_pretrained(tmp_path)
    hf.ViTImageProcessorPil().save_pretrained(tmp_path)
    hf.GenerationConfig().save_pretrained(tmp_path)
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) >= 4 and all(map(is_release_file, names))


OTHERS = ["credentials.json", "passwords.txt", "notes.md", "tokenizer_secret.json", "vocab_of_patients.txt"]
OTHERS += ["model_secret.safetensors", "model-00001-of-00002.safetensors", "my_preprocessor_config.json", ".env.json"]


def test_nothing_but_the_release_is_uploaded(release, tmp_path):
    before = {file.name for file in release.iterdir()}
    for name in OTHERS:
        (release / name).write_text("{}")
    (tmp_path / "secret").write_text("secret")
    (release / "notes.txt").symlink_to(tmp_path / "secret")
    (release / "checkpoint-3").mkdir()
    with prepare_upload(release, "me/x") as planned:
        assert planned.files.keys() == before
        assert set(planned.left) == {*OTHERS, "notes.txt", "checkpoint-3/"}


@pytest.mark.parametrize("name", ["vocab.txt", "README.md", "config.json", "model.safetensors", CARD_NAME])
def test_a_link_out_of_the_folder_is_refused(release, tmp_path, name):
    """Also to another file of the folder, which is no part of the release."""
    if not (release / name).exists():
        (release / name).write_text("{}")
    for place in (tmp_path / "secret", release / "secret"):
        place.write_bytes((release / name).read_bytes())
        (release / name).unlink()
        (release / name).symlink_to(place)
        refused(release, f"{name} in .* is a link to .*secret")


def test_links_that_stay(release, tmp_path, monkeypatch):
    """In the folder; and in the cache of the Hub to its blobs, also where these are links into a store of the cache."""
    (release / "vocab.txt").symlink_to("README.md")
    with prepare_upload(release, "me/x") as planned:
        assert "vocab.txt" in planned.files
    (release / "vocab.txt").unlink()
    repository = tmp_path / "cache" / "models--me--x"
    snapshot = repository / "snapshots" / "a"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (tmp_path / "cache" / "store").mkdir()
    for number, file in enumerate(sorted(release.iterdir())):
        blob = repository / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    with prepare_upload(snapshot, "me/x") as planned:
        assert len(planned.files) == 4
    blob.rename(tmp_path / "cache" / "store" / "y")
    blob.symlink_to("../../store/y")
    refused(snapshot, "is a link to")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with prepare_upload(snapshot, "me/x") as planned:
        assert len(planned.files) == 4


def test_the_command_lists_what_stays(release, hub):
    for name in ("credentials.json", "a\x1b[2J\nError: b.txt", *(f"{n}.txt" for n in range(30))):
        (release / name).write_text("{}")
    done = CliRunner().invoke(app, ["push", str(release), "me/tiny"])
    assert done.exit_code == 0, done.output
    line = next(line for line in done.output.splitlines() if line.startswith("stays here: "))
    assert line.endswith(", and 12 more") and done.output.index(line) < done.output.index("uploaded: ")
    assert "\x1b" not in done.output and "\nError" not in done.output
