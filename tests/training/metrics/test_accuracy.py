"""Accuracy against scikit-learn, from the class and from the file, and `classification_metrics`."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from transformers import EvalPrediction

from proxbit.training.metrics import Accuracy, classification_metrics

FILE = Path(classification_metrics.__code__.co_filename).with_name("accuracy.py")


def draws(classes, absent=None, count=200):
    """Predictions right about half of the time, and references without the class `absent`."""
    generator = np.random.default_rng(0)
    references = generator.choice([label for label in range(classes) if label != absent], count)
    guesses = generator.integers(0, classes, count)
    return np.where(generator.random(count) < 0.5, references, guesses), references


@pytest.mark.parametrize("absent", [None, 1], ids=["all classes", "one missing"])
def test_it_is_that_of_scikit_learn(absent):
    predictions, references = draws(4, absent)
    expected = accuracy_score(references, predictions)
    assert Accuracy().compute(predictions=predictions, references=references) == {"accuracy": pytest.approx(expected)}


def test_the_file_loads_by_its_path(tmp_path):
    predictions, references = draws(4)
    metric = evaluate.load(str(FILE), cache_dir=str(tmp_path))
    result = metric.compute(predictions=predictions, references=references)
    assert result == {"accuracy": pytest.approx(accuracy_score(references, predictions))}


def test_batches_add_up():
    predictions, references = draws(3)
    metric = Accuracy()
    for part in np.array_split(np.arange(len(references)), 3):
        metric.add_batch(predictions=predictions[part], references=references[part])
    assert metric.compute() == {"accuracy": pytest.approx(accuracy_score(references, predictions))}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: (s, np.zeros((len(s), 7)))], ids=["array", "tuple"])
def test_the_metrics_of_a_trainer(wrap):
    """A model that returns more than logits gives a tuple that begins with them."""
    generator = np.random.default_rng(1)
    references = generator.choice(4, 300, p=[0.7, 0.1, 0.1, 0.1])
    scores = generator.standard_normal((300, 4)) + 2 * np.eye(4)[references] * (references == 0)[:, None]
    result = classification_metrics(EvalPrediction(predictions=wrap(scores), label_ids=references))
    best = scores.argmax(1)
    assert result == {
        "accuracy": pytest.approx(accuracy_score(references, best)),
        "balanced_accuracy": pytest.approx(balanced_accuracy_score(references, best)),
    }
    assert result["accuracy"] > result["balanced_accuracy"] + 0.1
    assert all(type(value) is float for value in result.values())
