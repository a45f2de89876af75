"""Every block of code in the documents runs: Python block by block, the commands of proxbit line by line.

The Hub is that of the tests, with a tiny model under the name that the documents use.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest
import transformers as hf
from PIL import Image
from sklearn.datasets import load_digits

from hub_server import File, Repository
from proxbit.cli import main
from proxbit.quantizers import PAIRS
from proxbit.training import RECIPES

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Lines that set up a machine, as .ci/run does, or take hours.
NOT_HERE = (
    "pip install ",
    "python3 -m venv ",
    "python benchmarks/",
    "python trials",
    "python examples/",
    "accelerate launch --config_file examples/",
    "ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/",
)
MODEL = "google/vit-base-patch16-224"


def blocks(text):
    """Language and code, in order, but for plain text."""
    return [(language, code) for language, code in BLOCK.findall(text) if language in ("python", "bash")]


PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if blocks(path.read_text())]


@pytest.fixture
def place(hub, monkeypatch, tmp_path):
    """A folder with pictures, and a Hub with a model."""
    folder = tmp_path / "place"
    digits = load_digits()
    for label in range(3):
        for i, image in enumerate(digits.images[digits.target == label][:6]):
            path = folder / "pictures" / ("train" if i < 4 else "test") / f"digit-{label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15).astype("uint8")).resize((32, 32)).save(path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = hf.ViTForImageClassification(hf.ViTConfig(image_size=32, patch_size=8, num_labels=4, **sizes))
    made = tmp_path / "made"
    model.save_pretrained(made)
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(made)
    repository = hub.hub.repositories[MODEL] = Repository()
    files = {path.name: File(path.read_bytes(), large=False) for path in made.iterdir()}
    repository.commit("main", files, [], "a model")
    monkeypatch.chdir(folder)
    for registry in (PAIRS, RECIPES):  # What a page registers goes with it.
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    return folder


def run_command(line, monkeypatch):
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page, place, monkeypatch):
    names = {"__name__": page.stem}
    ran = 0
    for language, code in blocks(page.read_text()):
        if language == "python":
            exec(compile(code, page.name, "exec"), names)
            ran += 1
            continue
        for line in code.splitlines():
            if line.startswith("proxbit "):
                run_command(line, monkeypatch)
                ran += 1
            else:
                assert line.startswith(NOT_HERE), line
    assert ran > 0


def test_blocks_are_found():
    text = "a\n\n```python\nx = 1\n```\n\n```\nplain\n```\n\n```bash\nproxbit env\n```\n"
    assert blocks(text) == [("python", "x = 1\n"), ("bash", "proxbit env\n")]
