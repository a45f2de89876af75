"""Writes the table of families, `families.md`, from what the tests hold: `python docs/families.py [FOLDER]`."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from torch import nn  # noqa: E402

import proxbit  # noqa: E402
from families import TABLE  # noqa: E402
from tiny_models import FAMILIES  # noqa: E402

HEAD = """# The families

Written by `python docs/families.py` from `tests/families.py`; a test fails when it is stale. For each row,
`tests/test_families.py` and `tests/test_family_recipes.py` take a tiny model of random weights through this: binarize
with the defaults, a training step whose gradient reaches every 1-bit layer, pack, save, reload, fuse, with the same
output each time; then the same with the recipes `w1a8` and `w1a1`, calibrated. Which layers are 1-bit is compared with
this page.

Patterns name modules as `model.named_modules()` does. Other choices are made with `include` and
`modules_to_not_convert`. Fewer bits an activation, as in `w1a8` and `w1a1`, are for linear layers: binarized
convolutions multiply floats.

| family | class of transformers | 1-bit by default | left as it is | fewer bits an activation |
|---|---|---|---|---|
"""

FOOT = """
*Frozen by transformers*: what requires no gradient when the model is binarized is left, for it would stay at the signs
of its float weights. `DetrForObjectDetection` freezes a ResNet backbone; after `model.model.unfreeze_backbone()` it is
1-bit too.

*nn.MultiheadAttention* multiplies with its weights in its own way, past its linear layer. So does a model whose
`forward` names the weight of a layer, `self.wo.weight`, instead of calling it alone: `proxbit` reads the source and
leaves that layer float. The attention of BEiT, EVA-02 and Swin V2 in `timm` multiplies so too, but can be told to call
its layer, and is told.

*Text side*: the largest part around an embedding that token ids go into, in which nothing reads pictures. That is the
decoder of TrOCR, Donut and Pix2Struct, BERT or GPT-2 behind a ViT, the language model of LLaVA, PaliGemma, BLIP,
Florence-2, SmolVLM or Kosmos-2, the text encoder of OWLv2. What lies between the sides, as a projector, is 1-bit. Where
the layers behind the vocabulary lie beside the picture side, as in GIT, they stay too; where one stack takes pictures
and words, as in ViLT, nothing is chosen by default.

A model of your own is read for it: an embedding is of a vocabulary if a `forward` calls it on what it was given, and
not on numbers that it makes, as of places. The last layer of a model is one whose output its `forward` returns, alone,
in a container or through functions; a bare `nn.Sequential` is a stack of layers, without a last one. What is called in
another way is named with `modules_to_not_convert`.

In DETR and MaskFormer the values of the first self-attention of the decoder are 1-bit and get no gradient: they read
zeros, whatever their bits are.

Models of `timm`, through `TimmWrapperForImageClassification`: the wrapper is tested with a small model that has timm's
names, and not with timm itself, which needs torchvision.
"""


def _patterns(patterns: tuple[str, ...]) -> str:
    return ", ".join(f"`{pattern}`" for pattern in patterns)


def _line(name: str) -> str:
    row, model = TABLE[name], FAMILIES[name]()
    reasons: dict[str, list[str]] = {}
    for pattern, reason in row.left.items():
        reasons.setdefault(reason, []).append(pattern)
    left = "; ".join(f"{reason}: {_patterns(tuple(patterns))}" for reason, patterns in reasons.items())
    linear = any(isinstance(layer, nn.Linear) for _, layer in proxbit.nn.latent_layers(proxbit.binarize(model)))
    activations = "yes" if linear else "no: all convolutions"
    return f"| {row.title} | `{type(model).__name__}` | {_patterns(row.binarized)} | {left} | {activations} |\n"


def write(folder: Path) -> None:
    """Write the page into a folder."""
    page = HEAD + "".join(map(_line, TABLE)) + FOOT
    (folder / "families.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
