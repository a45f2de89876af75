"""What a model is shown: images in every form, and chunks that do not depend on batches."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTImageProcessorPil

from families import TABLE
from proxbit.errors import ConfigError, DataError
from proxbit.training.batches import CHUNK, batches_of, chunks_of, length, main_input
from tiny_models import FAMILIES, SIDE


@pytest.fixture(scope="module")
def vit():
    return FAMILIES["vit"]()


def pictures(crops, count=5):
    arrays = (crops(count, SIDE) * 50 + 100).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each) for each in arrays]


PROCESSOR = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def forms(crops):
    pixels, images = crops(5, SIDE), pictures(crops)
    rows = [{"pixel_values": each, "labels": i} for i, each in enumerate(pixels)]
    return {
        "tensor": pixels,
        "mapping": {"pixel_values": pixels, "labels": torch.arange(5)},
        "list of tensors": list(pixels),
        "list of batches": [pixels[:3], pixels[3:]],
        "list of mappings": [{"pixel_values": pixels[:3]}, {"pixel_values": pixels[3:]}],
        "list of examples": rows,
        "loader": DataLoader(rows, batch_size=2),
        "loader of pairs": DataLoader(TensorDataset(pixels, torch.arange(5)), batch_size=2),
        "dataset": torch.utils.data.Subset(rows, range(5)),
        "dataset of pairs": TensorDataset(pixels, torch.arange(5)),
        "generator": (each for each in pixels),
        "images": images,
        "generator of images": iter(images),
        "images and labels": [(each, 1) for each in images],
        "datasets": datasets.Dataset.from_dict({"image": images, "label": [0] * 5}),
        "datasets with a transform": datasets.Dataset.from_dict({"k": list(range(5))}).with_transform(
            lambda batch: {"pixel_values": [pixels[k] for k in batch["k"]], "labels": batch["k"]}
        ),
    }


FORMS = list(forms(lambda count, side: torch.zeros(count, 3, side, side)))


@pytest.mark.parametrize(("form", "most"), [(form, (None, 3)[i % 2]) for i, form in enumerate(FORMS)])
def test_every_form_gives_the_same_images(form, most, vit, crops):
    found = list(batches_of(vit, forms(crops)[form], images=most, processor=PROCESSOR))
    assert all(set(batch) == {"pixel_values"} for batch in found)
    pixels = torch.cat([batch["pixel_values"] for batch in found])
    assert pixels.shape == (most or 5, 3, SIDE, SIDE)
    whole = crops(5, SIDE) if "image" not in form and form != "datasets" else None
    if whole is None:
        whole = PROCESSOR(images=pictures(crops), return_tensors="pt")["pixel_values"]
    assert all(any(torch.equal(each, other) for other in whole) for each in pixels)
    assert len({each.numpy().tobytes() for each in pixels}) == (most or 5)


def test_a_draw_is_random_and_the_same_for_a_seed(vit, crops):
    images = list(crops(40, SIDE))
    drawn = [next(batches_of(vit, images, images=8, seed=seed))["pixel_values"] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], torch.stack(images[:8]))


def test_the_processor_beside_the_model_prepares_images(tmp_path, vit, crops):
    vit.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    model = type(vit).from_pretrained(tmp_path)
    found = next(batches_of(model, pictures(crops), images=None))
    assert found["pixel_values"].shape == (5, 3, SIDE, SIDE)
    with pytest.raises(ConfigError, match=r"no image processor beside it .* processor=\.\.\."):
        next(batches_of(vit, pictures(crops), images=None))


@pytest.mark.parametrize("family", TABLE)
def test_a_batch_of_every_family_is_a_batch(family, crops):
    inputs = TABLE[family].inputs(crops(3, TABLE[family].side))
    found = list(batches_of(FAMILIES[family](), [inputs], images=None))
    assert len(found) == 1 and length(found[0]) == 3 and set(found[0]) == set(inputs)


def test_the_argument_of_a_plain_module():
    assert main_input(nn.Sequential(nn.Linear(2, 2))) == "input"
    assert main_input(FAMILIES["vit"]()) == "pixel_values"
    assert main_input(nn.DataParallel(FAMILIES["vit"]())) == "pixel_values"
    found = list(batches_of(nn.Sequential(nn.Linear(2, 2)), torch.zeros(4, 2), images=None))
    assert list(found[0]) == ["input"]


@pytest.mark.parametrize(
    "data, message",
    [
        (None, "calibrate takes a dataset, a DataLoader, .*; not None"),
        ("photos", "calibrate takes a dataset, .*; not 'photos'"),
        ([3], "calibrate takes .*; not a int"),
        ([{}], r"a batch holds tensors with at least one example, not \{\}"),
        ([{"labels": torch.zeros(3)}], r"a batch holds tensors with at least one example, not \{\}"),
        ([torch.zeros(0, 3, SIDE, SIDE)], "a batch holds tensors with at least one example"),
    ],
)
def test_what_is_refused(data, message, vit):
    with pytest.raises(ConfigError, match=message):
        list(batches_of(vit, data, images=None))


@pytest.mark.parametrize("sizes", [[40], [7, 33], [1] * 40])
def test_chunks_do_not_depend_on_batches(sizes):
    x = torch.randn(40, 3)
    chunks = chunks_of([{"x": part, "flag": True} for part in x.split(sizes)])
    assert [length(chunk) for chunk in chunks] == [CHUNK, CHUNK, 8]
    assert torch.equal(torch.cat([chunk["x"] for chunk in chunks]), x) and all(chunk["flag"] for chunk in chunks)


def test_other_shapes_stay_apart():
    chunks = chunks_of([{"x": torch.zeros(3, 4)}, {"x": torch.zeros(2, 5)}, {"x": torch.ones(2, 4)}])
    assert [tuple(chunk["x"].shape) for chunk in chunks] == [(5, 4), (2, 5)]
    odd = [{"x": torch.zeros(3, 4), "y": torch.zeros(2)}] * 2
    assert [len(chunk["x"]) for chunk in chunks_of(odd)] == [3, 3]


def test_images_are_shown_as_those_of_files(vit):
    """16 bits by their high byte, transparent pixels on white; what cannot be shown truly is refused."""
    white = [Image.fromarray(np.full((9, 9), 65535, np.uint16)), Image.new("RGBA", (9, 9)), Image.new("L", (9, 9), 255)]
    pixels = next(batches_of(vit, white, images=None, processor=PROCESSOR))["pixel_values"]
    assert torch.equal(pixels, torch.ones_like(pixels))
    with pytest.raises(DataError, match="calibrate: an image of mode F cannot be taken: its pixels are floats from -1"):
        list(batches_of(vit, [Image.new("F", (9, 9), -1)], images=None, processor=PROCESSOR))
