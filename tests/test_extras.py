"""What `pip install proxbit` alone can do, and what the rest says that it needs."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from proxbit.errors import MissingPackageError
from proxbit.extras import import_with_extras

OPTIONAL = ("accelerate", "datasets", "evaluate", "jinja2", "matplotlib", "onnxscript", "peft", "rich", "typer")
ALONE = """
import sys
sys.modules |= dict.fromkeys(sys.argv[2:])
import proxbit
import torch
from transformers import AutoModelForImageClassification, ViTConfig
sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
model = AutoModelForImageClassification.from_config(ViTConfig(image_size=16, patch_size=8, **sizes)).eval()
packed = proxbit.pack(proxbit.binarize(model, proxbit.BinarizationConfig(activations="int8")))
packed.save_pretrained(sys.argv[1])
again = AutoModelForImageClassification.from_pretrained(sys.argv[1])
images = torch.rand(2, 3, 16, 16)
assert torch.equal(again(images).logits, packed(images).logits)
from proxbit.training import get_recipe
assert get_recipe("w1a8").training
for name in proxbit.__all__:
    try:
        getattr(proxbit, name)
    except ImportError as error:
        print(name, "|", error)
"""


def test_inference_needs_no_optional_package(tmp_path):
    command = [sys.executable, "-c", ALONE, tmp_path / "model", *OPTIONAL]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needs = dict(line.split(" | ") for line in found.splitlines())
    for name, extra in (("calibrate", "train"), ("ProxConnectTrainer", "train"), ("summary", "cli"), ("push", "cli")):
        assert f"proxbit.{name} needs the package" in needs[name] and f"'proxbit[{extra}]'" in needs[name]
    assert "'proxbit[onnx]'" in needs["export_onnx"] and "'proxbit[peft]'" in needs["packed_lora"]


def test_a_missing_module_that_no_extra_installs_is_an_error_of_its_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "proxbit.analysis.plots", None)
    with pytest.raises(ModuleNotFoundError) as found:
        import_with_extras("proxbit.analysis.plots", "proxbit plot")
    assert not isinstance(found.value, MissingPackageError)


@pytest.mark.parametrize("package", ["proxbit", "proxbit.training"])
def test_type_checkers_and_the_docs_see_the_names_that_are_imported_late(package):
    module = import_module(package)
    tree = ast.parse(Path(module.__file__).read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {name.name: node.module for node in imports for name in node.names} == module._LAZY
