"""Nothing in the source runs what it reads: no unpickling, no code or shell from text, no archives, no remote code."""

import ast
import contextlib
import os
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTForImageClassification

import proxbit
from proxbit.hub.release import write_release
from tiny_models import SIDE, vit

ROOT = Path(__file__).parents[1]
FILES = sorted(file for part in ("src", "examples") for file in (ROOT / part).rglob("*.py"))
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "zipfile", "tarfile", "code"}
CALLS = {
    "builtins": {"eval", "exec", "compile", "__import__"},
    "torch": {"load"},
    "yaml": {"load", "load_all", "unsafe_load", "full_load"},
    "os": {"system", "popen", "execv", "execvp", "spawnl"},
    "tempfile": {"mktemp"},
    "shutil": {"unpack_archive"},
    "numpy": {"load"},
    "np": {"load"},
    "jinja2": {"Template"},
}
# To be caught, which unpickles nothing.
ERRORS = {"UnpicklingError"}
WORDS = {"shell", "trust_remote_code", "allow_pickle"}


def findings(source: str) -> list[str]:
    """What a source does that it must not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            names = {alias.name for alias in node.names}
            found += [module] if module in MODULES and names - ERRORS else sorted(names & CALLS.get(module, set()))
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in CALLS["builtins"]:
                found.append(function.id)
            elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                if function.attr in CALLS.get(function.value.id, set()):
                    found.append(f"{function.value.id}.{function.attr}")
            found += [word.arg for word in node.keywords if word.arg in WORDS and ast.unparse(word.value) != "False"]
    return found


def test_the_source_runs_nothing_that_it_reads():
    found = {file: findings(file.read_text(encoding="utf-8")) for file in FILES}
    assert len(found) > 100
    assert {file: what for file, what in found.items() if what} == {}


FORBIDDEN = """
import pickle
from pickle import load
from torch import load
torch.load(file)
eval(text)
exec(text)
yaml.load(text)
subprocess.run(line, shell=True)
AutoModel.from_pretrained(name, trust_remote_code=True)
AutoModel.from_pretrained(name, trust_remote_code=None)
np.load(file, allow_pickle=True)
tempfile.mktemp()
"""
ALLOWED = """
model.eval()
yaml.safe_load(text)
subprocess.run([a, b])
torch.save(x, y)
"""


def test_the_check_sees_each_of_these_and_lets_the_rest_pass():
    assert [line for line in FORBIDDEN.split("\n") if line and not findings(line)] == []
    assert findings(ALLOWED) == []


def loads(source: str) -> list[str]:
    """The calls by which a source has transformers read a name or a folder."""
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = {"from_pretrained", "from_config"}
    return [ast.unparse(call) for call in calls if isinstance(call, ast.Attribute) and call.attr in names]


def test_one_module_has_transformers_load():
    """`plugin/loading.py`, where `trust_remote_code=False` is said, once and for all."""
    found = {str(f.relative_to(ROOT)): loads(f.read_text(encoding="utf-8")) for f in FILES if "examples" not in f.parts}
    assert {file: calls for file, calls in found.items() if calls} == {
        "src/proxbit/plugin/loading.py": [
            "kind.from_pretrained",
            "transformers.AutoModelForImageClassification.from_config",
        ]
    }


@pytest.fixture
def no_pickles(monkeypatch):
    """Unpickling is an error."""

    def forbidden(*arguments, **keywords):
        raise AssertionError("something was unpickled")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler", "torch.load"):
        monkeypatch.setattr(name, forbidden)


def test_a_model_lives_without_unpickling(no_pickles, tmp_path):
    """From float to latent, to packed, to a release, and back."""
    with pytest.raises(AssertionError, match="unpickled"):
        pickle.loads(pickle.dumps(os.getcwd))
    model = proxbit.binarize(ViTForImageClassification(vit()))
    model.save_pretrained(tmp_path / "latent")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "latent")
    write_release(proxbit.pack(model), tmp_path / "release")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "release")
    assert loaded(torch.zeros(1, 3, SIDE, SIDE)).logits.isfinite().all()


class Marks:
    """Unpickling an instance makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_of_a_run_does_not_run_code(tmp_path, crops, name):
    """What the Trainer of transformers reads when a run goes on."""
    model = proxbit.binarize(ViTForImageClassification(vit()))
    data = [{"pixel_values": crop, "labels": 0} for crop in crops(4, SIDE)]
    args = proxbit.ProxConnectArguments(
        str(tmp_path / "run"), max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True
    )
    proxbit.ProxConnectTrainer(model=model, args=args, train_dataset=data).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert (checkpoint / name).is_file()
    (checkpoint / name).write_bytes(pickle.dumps(Marks(tmp_path / "mark")))
    with contextlib.suppress(Exception):  # Any error at all, or none: a file that nobody reads.
        proxbit.ProxConnectTrainer(model=model, args=args, train_dataset=data).train(
            resume_from_checkpoint=str(checkpoint)
        )
    assert not (tmp_path / "mark").exists()
    with pytest.raises(FileExistsError):  # The control: unpickled, it does leave its mark.
        for _ in range(2):
            pickle.loads((checkpoint / name).read_bytes())
