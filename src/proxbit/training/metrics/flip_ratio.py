"""Flip ratio, as an `evaluate` module that works offline: `evaluate.load` takes this file's path."""

from typing import Any

import datasets
import evaluate
import numpy as np

__all__ = ["FlipRatio"]


class FlipRatio(evaluate.Metric):
    r"""The share of weights whose sign differs between two moments, in [0, 1]; zero counts as positive.

    Formula:
        \sum_i 1[(predictions_i \ge 0) \ne (references_i \ge 0)] / n

    The inputs are called predictions (the later weights) and references (the earlier ones) as in every metric.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions: n latent weights, later. references: the same n weights, earlier.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        later, earlier = np.asarray(predictions) >= 0, np.asarray(references) >= 0
        return {"flip_ratio": float(np.mean(later != earlier))}
