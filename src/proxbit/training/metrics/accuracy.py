"""Accuracy, as an `evaluate` module that works offline: `evaluate.load` takes this file's path."""

from typing import Any

import datasets
import evaluate
import numpy as np

__all__ = ["Accuracy"]


class Accuracy(evaluate.Metric):
    r"""The share of right predictions, in [0, 1].

    Formula:
        \sum_i 1[prediction_i = reference_i] / n
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions: n class numbers. references: n class numbers.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
