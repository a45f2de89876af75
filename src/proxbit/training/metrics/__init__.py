"""Metrics as `evaluate` modules, and the function that a Trainer takes as `compute_metrics`."""

from typing import Any

import numpy as np

from proxbit.training.metrics.accuracy import Accuracy
from proxbit.training.metrics.balanced_accuracy import BalancedAccuracy
from proxbit.training.metrics.flip_ratio import FlipRatio

__all__ = ["Accuracy", "BalancedAccuracy", "FlipRatio", "classification_metrics"]


def classification_metrics(prediction: Any) -> dict[str, float]:
    """Accuracy and balanced accuracy of class scores, for `Trainer(compute_metrics=...)`.

    Args:
        prediction: an `EvalPrediction`: scores `[n, classes]` (or a tuple that begins with them) and labels `[n]`.
    """
    scores = prediction.predictions
    scores = scores[0] if isinstance(scores, tuple) else scores
    arguments = {"predictions": np.argmax(scores, axis=-1), "references": prediction.label_ids}
    result: dict[str, float] = {}
    for metric in (Accuracy(), BalancedAccuracy()):
        result |= metric.compute(**arguments)
    return result
