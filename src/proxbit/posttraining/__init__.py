"""Binarization without training: weights, biases and quantizers in closed form, from unlabelled images."""

from proxbit.posttraining.report import CalibrationReport, LayerFit, calibration_of
from proxbit.posttraining.walk import Told, fit_weights

__all__ = ["CalibrationReport", "LayerFit", "Told", "calibration_of", "fit_weights"]
