"""The images of an evaluation: which are chosen, what is said of them, and their pixels."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from transformers import ViTImageProcessor, default_data_collator
from transformers.trainer_utils import EvalLoopOutput

from proxbit.training.recorder import IMAGES, SIDE, choose

COUNT = 60


def output(predictions, labels):
    return EvalLoopOutput(predictions=predictions, label_ids=labels, metrics={}, num_samples=len(labels))


def logits_and_labels():
    """Every fourth answer is wrong, and the later the surer."""
    labels = np.arange(COUNT) % 3
    answers = np.where(np.arange(COUNT) % 4 == 0, (labels + 1) % 3, labels)
    logits = np.zeros((COUNT, 3), dtype=np.float32)
    logits[np.arange(COUNT), answers] = 1 + np.arange(COUNT) / 10
    return logits, labels


def loader(images):
    examples = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]
    return DataLoader(examples, batch_size=8, collate_fn=default_data_collator)


def pixels_of(one):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(one["png"]))))


def test_the_surest_mistakes_and_right_answers_from_everywhere(crops):
    logits, labels = logits_and_labels()
    found = choose(loader(crops(COUNT, 8)), output(logits, labels), {0: "zero", 1: "one"})
    wrong, right = found.indices[:IMAGES], found.indices[IMAGES:]
    assert wrong == sorted((i for i in range(COUNT) if i % 4 == 0), reverse=True)[:IMAGES]
    assert right == sorted(right) and len(right) == IMAGES
    assert (right[0], right[-1]) == (1, COUNT - 1)
    assert (found.total, found.right) == (COUNT, COUNT - COUNT // 4)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    names = ["zero", "one", "2"]
    for index, answer in zip(found.indices, found.answers, strict=True):
        assert answer["label"] == names[labels[index]]
        assert answer["prediction"] == names[logits[index].argmax()]
        assert answer["right"] == (index % 4 != 0)
        assert answer["probability"] == pytest.approx(probabilities[index].max(), abs=1e-4)
        assert answer["of_label"] == pytest.approx(probabilities[index, labels[index]], abs=1e-4)


def test_pictures_are_those_of_the_dataset(crops):
    """Without a processor the darkest value is black, the brightest white."""
    images = crops(COUNT, 8)
    found = choose(loader(images), output(*logits_and_labels()), {})
    made = found.to_dict(None)
    assert (made["total"], made["right"]) == (COUNT, 45)
    chosen = images[found.indices]
    expected = 255 * (chosen - chosen.min()) / (chosen.max() - chosen.min())
    for one, pixels in zip(made["pictures"], expected, strict=True):
        np.testing.assert_allclose(pixels_of(one), pixels.permute(1, 2, 0), atol=0.51)


def test_the_processor_says_what_was_normalized(crops):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    original = torch.from_numpy(np.round((crops(COUNT, 8).numpy() + 1) * 127.5)).float() / 255
    normalized = (original - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    found = choose(loader(normalized), output(*logits_and_labels()), {})
    made = found.to_dict(ViTImageProcessor(image_mean=mean, image_std=std))
    for index, one in zip(found.indices, made["pictures"], strict=True):
        np.testing.assert_array_equal(pixels_of(one), (255 * original[index]).round().permute(1, 2, 0))


def test_large_pictures_become_small_and_grey_ones_stay_grey(crops):
    large = choose(loader(crops(COUNT, 120)), output(*logits_and_labels()), {}).to_dict(None)
    assert all(pixels_of(one).shape == (SIDE, SIDE, 3) for one in large["pictures"])
    assert sum(len(one["png"]) for one in large["pictures"]) < 700_000
    grey = choose(loader(crops(COUNT, 8)[:, :1]), output(*logits_and_labels()), {}).to_dict(None)
    assert all(pixels_of(one).shape == (8, 8) for one in grey["pictures"])


def test_all_right_or_all_wrong(crops):
    logits, labels = logits_and_labels()
    for given, right in ((logits.argmax(1), COUNT), ((logits.argmax(1) + 1) % 3, 0)):
        found = choose(loader(crops(COUNT, 8)), output(logits, given), {})
        assert (found.right, len(found.indices)) == (right, IMAGES)


def test_random_numbers_stay_as_they_are(crops):
    found = choose(loader(crops(COUNT, 8)), output(*logits_and_labels()), {})
    before = torch.get_rng_state()
    found.to_dict(None)
    assert torch.equal(torch.get_rng_state(), before)


class Stream(IterableDataset):
    """As long as it says, if that is a number."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter(())

    def __len__(self):
        return len(self.length)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits, labels: (None, labels),
        lambda logits, labels: ((logits, logits), labels),
        lambda logits, labels: (logits.argmax(1), labels),
        lambda logits, labels: (logits, None),
        lambda logits, labels: (logits, np.eye(3)[labels]),
        lambda logits, labels: (logits, labels.astype(float)),
        lambda logits, labels: (logits, labels - 1),
        lambda logits, labels: (logits[:-1], labels[:-1]),
    ],
    ids=["no logits", "several", "classes", "no labels", "many labels", "regression", "left out", "shorter"],
)
def test_what_is_no_classification_of_pictures_has_none(crops, change):
    logits, labels = logits_and_labels()
    predictions, given = change(logits, labels)
    result = EvalLoopOutput(predictions=predictions, label_ids=given, metrics={}, num_samples=COUNT)
    assert choose(loader(crops(COUNT, 8)), result, {}) is None


@pytest.mark.parametrize("length", [range(COUNT), None], ids=["long", "endless"])
def test_of_a_stream_no_example_can_be_asked_for_again(length):
    assert choose(DataLoader(Stream(length)), output(*logits_and_labels()), {}) is None


def test_examples_without_pictures_have_none():
    examples = [{"input_ids": torch.zeros(4), "labels": i % 3} for i in range(COUNT)]
    dataloader = DataLoader(examples, collate_fn=default_data_collator)
    assert choose(dataloader, output(*logits_and_labels()), {}).to_dict(None) == {}
