"""The report: its text, its counts, and where it is left."""

import pytest
import transformers as hf
from torch import nn

import proxbit
from proxbit.config import BinarizationConfig
from proxbit.patching import BinarizationReport, ModuleDecision
from tiny_models import vit

DECISIONS = (
    ModuleDecision("body.0", "Linear", 1000, True, "default"),
    ModuleDecision("body.1", "Linear", 200, True, "default"),
    ModuleDecision("body.2", "Conv2d", 30, True, "default"),
    ModuleDecision("body.3", "Linear", 4, True, "default"),
    ModuleDecision("stem.conv", "Conv2d", 50, False, "stem"),
    ModuleDecision("extra", "Linear", 6, True, "include: extra"),
    ModuleDecision("head", "Linear", 7, False, "head"),
    ModuleDecision("stem.more", "Conv2d", 8, False, "stem"),
)

TEXT = """\
binarized 5 of 8 modules, 1,240 of 1,305 weights
  binarized: 4 (default): body.0, body.1, body.2, ...
  binarized: 1 (include: extra): extra
  left as they are: 2 (stem): stem.conv, stem.more
  left as they are: 1 (head): head"""

PATCHES = "vit.embeddings.patch_embeddings.projection"


@pytest.fixture
def model():
    return hf.ViTForImageClassification(vit())


def counts(model):
    """Weights of the layers in the body of a ViT, and of all its linear and convolutional layers."""
    weights = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    return sum(count for name, count in weights.items() if ".layers." in name), sum(weights.values())


def test_text():
    assert str(BinarizationReport("binarized", DECISIONS)) == TEXT


def test_names_and_reasons():
    report = BinarizationReport("binarized", DECISIONS)
    assert report.converted == ("body.0", "body.1", "body.2", "body.3", "extra")
    assert report.left == {"stem.conv": "stem", "head": "head", "stem.more": "stem"}


def test_three_names_are_shown_whole():
    text = str(BinarizationReport("packed", DECISIONS[:3]))
    assert text == "packed 3 of 3 modules, 1,230 of 1,230 weights\n  packed: 3 (default): body.0, body.1, body.2"


def test_it_is_no_part_of_the_model(model):
    """The attribute is neither a submodule nor a tensor, so that nothing of it is saved."""
    before = list(model.state_dict()), [name for name, _ in model.named_modules()]
    report = BinarizationReport("binarized", DECISIONS)
    report.attach(model)
    assert model.binarization_report is report
    assert (list(model.state_dict()), [name for name, _ in model.named_modules()]) == before


def test_every_conversion_leaves_its_own(model):
    """Weights are counted before packing: packing 8 of them into a byte does not make them fewer."""
    body, total = counts(model)
    layers = tuple(name for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name)
    actions = {"binarized": proxbit.binarize, "packed": proxbit.pack, "dequantized": proxbit.dequantize}
    for action, convert in actions.items():
        report = convert(model).binarization_report
        assert report.action == action
        assert report.converted == layers
        assert set(report.left) == {PATCHES, "classifier"}
        assert str(report).startswith(f"{action} 12 of 14 modules, {body:,} of {total:,} weights\n")


def test_reasons_of_a_binarized_model(model):
    config = BinarizationConfig(include=["vit.layers", PATCHES], modules_to_not_convert=["*.fc2"])
    lines = str(proxbit.binarize(model, config).binarization_report).splitlines()
    assert lines[1:] == [
        f"  binarized: 1 (include: {PATCHES}): {PATCHES}",
        "  binarized: 10 (include: vit.layers): vit.layers.0.attention.q_proj, vit.layers.0.attention.k_proj, "
        "vit.layers.0.attention.v_proj, ...",
        "  left as they are: 2 (modules_to_not_convert: *.fc2): vit.layers.0.mlp.fc2, vit.layers.1.mlp.fc2",
        "  left as they are: 1 (not in include): classifier",
    ]


def test_grouped_convolutions_are_counted_by_their_weights():
    model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 12, 3, groups=12))
    assert str(proxbit.binarize(model).binarization_report).startswith("binarized 1 of 2 modules, 216 of 324 weights")
    assert str(proxbit.pack(model).binarization_report).startswith("packed 1 of 2 modules, 216 of 324 weights")
