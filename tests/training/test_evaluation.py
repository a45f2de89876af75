"""Accuracy through the pipeline of transformers and the evaluator of evaluate, against a loop of our own."""

import datasets
import numpy as np
import pytest
import torch
import transformers as hf

import proxbit
from picture_folders import pieces, tiny_classifier
from proxbit.errors import DataError
from proxbit.training.evaluation import evaluate_images
from proxbit.training.image_folders import Images, LeftOut

TRUTH = [0, 1, 1, 0, 1, 1]


@pytest.fixture(scope="module")
def drawn(photographs):
    return pieces(photographs, 0, 3) + pieces(photographs, 1, 3)


@pytest.fixture(scope="module")
def images(drawn):
    """Three of each photograph; the labels are not those of the photographs, so that accuracy is neither 0 nor 1."""
    features = datasets.Features({"image": datasets.Image(mode="RGB"), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": drawn, "label": TRUTH}, features=features)
    return Images(data, ("flower", "temple"), (LeftOut("x.jpg", "not an image"),))


@pytest.fixture
def model(tmp_path):
    tiny_classifier(tmp_path)
    return hf.AutoModelForImageClassification.from_pretrained(tmp_path).eval()


PROCESSOR = hf.ViTImageProcessorPil(size={"height": 32, "width": 32})


def by_hand(model, drawn, numbers):
    with torch.no_grad():
        pixels = PROCESSOR([one.convert("RGB") for one in drawn], return_tensors="pt")
        answers = model(**pixels).logits.argmax(-1).numpy()
    right = answers == np.array([numbers[label] for label in TRUTH])
    return right.mean(), np.mean([right[np.array(TRUTH) == label].mean() for label in (0, 1)])


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_accuracy_is_that_of_a_loop(model, images, drawn, batch, packed):
    """With a head that has seen the images a little: some right, some wrong."""
    if packed:
        proxbit.pack(proxbit.binarize(model))
    with torch.no_grad():
        pixels = PROCESSOR([drawn[0].convert("RGB"), drawn[4].convert("RGB")], return_tensors="pt")
        first, second = model.vit(**pixels).last_hidden_state[:, 0]
        model.classifier.weight[0], model.classifier.weight[2] = first - second, second - first
    expected = by_hand(model, drawn, {0: 0, 1: 2})
    assert 0 < expected[0] < 1
    found = evaluate_images(model, PROCESSOR, images, name="m", batch=batch)
    assert (found.accuracy, found.balanced_accuracy) == pytest.approx(expected)
    assert found.pictures == len(TRUTH) and found.left_out == images.left_out
    assert found.latency_ms > 0 and found.pictures_per_second > 0


def test_two_labels_of_one_name_are_two_labels(model, images, drawn):
    """As "crane" in ImageNet, a bird and a machine: the pipeline answers with names, accuracy counts numbers."""
    model.config.id2label = {0: "crane", 1: "other", 2: "crane"}
    model.config.label2id = {"flower": 0, "other": 1, "temple": 2}
    with torch.no_grad():
        model.classifier.bias[0] += 1e3
    assert evaluate_images(model, PROCESSOR, images, name="m").accuracy == TRUTH.count(0) / len(TRUTH)


def test_the_watcher_sees_every_answer(model, images):
    seen = []

    def watch(items, total):
        for item in items:
            seen.append(total)
            yield item

    evaluate_images(model, PROCESSOR, images, name="m", watch=watch)
    assert seen == [len(TRUTH)] * len(TRUTH)


def test_classes_that_are_no_labels_are_refused(model, images):
    strange = Images(images.dataset, ("cat", "temple"), ())
    with pytest.raises(DataError, match="'cat'"):
        evaluate_images(model, PROCESSOR, strange, name="m")
