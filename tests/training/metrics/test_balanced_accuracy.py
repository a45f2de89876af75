"""Balanced accuracy against scikit-learn, from the class and from the file."""

import inspect

import evaluate
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from proxbit.training.metrics import BalancedAccuracy

FILE = inspect.getfile(BalancedAccuracy)


def draws(shares, count=300):
    """References with these shares of the classes; predictions are right for class 0 more often than for others."""
    generator = np.random.default_rng(0)
    references = generator.choice(len(shares), count, p=shares)
    right = generator.random(count) < np.where(references == 0, 0.9, 0.3)
    return np.where(right, references, generator.integers(0, len(shares), count)), references


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("shares", [(0.25,) * 4, (0.85, 0.05, 0.05, 0.05), (0.7, 0.2, 0, 0.1)], ids=str)
def test_it_is_that_of_scikit_learn(shares):
    """A class that no reference has does not count, even where it is predicted."""
    predictions, references = draws(shares)
    assert set(predictions) == {0, 1, 2, 3}
    expected = balanced_accuracy_score(references, predictions)
    result = BalancedAccuracy().compute(predictions=predictions, references=references)
    assert result == {"balanced_accuracy": pytest.approx(expected)}


def test_one_prediction_for_all_is_worth_one_class():
    references = np.array([0] * 97 + [1, 2, 3])
    result = BalancedAccuracy().compute(predictions=np.zeros(100, dtype=int), references=references)
    assert result["balanced_accuracy"] == pytest.approx(1 / 4)


def test_the_file_loads_by_its_path(tmp_path):
    predictions, references = draws((0.6, 0.3, 0.1))
    metric = evaluate.load(FILE, cache_dir=str(tmp_path))
    result = metric.compute(predictions=predictions, references=references)
    assert result == {"balanced_accuracy": pytest.approx(balanced_accuracy_score(references, predictions))}
