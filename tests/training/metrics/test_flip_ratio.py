"""The flip ratio against a direct count, from the class and from the file."""

import inspect

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score

from proxbit.training.metrics import FlipRatio

FILE = inspect.getfile(FlipRatio)


def weights():
    """Earlier and later weights, with noise that flips some of the signs."""
    generator = np.random.default_rng(0)
    earlier = generator.standard_normal(500)
    return earlier + 0.7 * generator.standard_normal(500), earlier


def test_it_is_the_share_of_signs_that_differ():
    later, earlier = weights()
    expected = sum((a < 0) != (b < 0) for a, b in zip(later, earlier)) / 500
    assert 0.1 < expected < 0.4
    assert FlipRatio().compute(predictions=later, references=earlier) == {"flip_ratio": pytest.approx(expected)}


def test_zero_counts_as_positive():
    result = FlipRatio().compute(predictions=[0.0, -0.0, 0.0, -1.0], references=[1.0, 2.0, -1.0, 0.0])
    assert result == {"flip_ratio": pytest.approx(2 / 4)}


def test_the_file_loads_by_its_path(tmp_path):
    later, earlier = weights()
    metric = evaluate.load(FILE, cache_dir=str(tmp_path))
    result = metric.compute(predictions=later, references=earlier)
    assert result == {"flip_ratio": pytest.approx(1 - accuracy_score(earlier < 0, later < 0))}
