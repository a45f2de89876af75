"""Balanced accuracy, as an `evaluate` module that works offline: `evaluate.load` takes this file's path."""

from typing import Any

import datasets
import evaluate
import numpy as np

__all__ = ["BalancedAccuracy"]


class BalancedAccuracy(evaluate.Metric):
    r"""The mean recall of the classes that occur, in [0, 1]: a rare class counts as much as a common one.

    Formula:
        \frac{1}{C} \sum_c \sum_i 1[prediction_i = c, reference_i = c] / \sum_i 1[reference_i = c]
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions: n class numbers. references: n class numbers.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        recalls = [np.mean(predictions[references == label] == label) for label in np.unique(references)]
        return {"balanced_accuracy": float(np.mean(recalls))}
