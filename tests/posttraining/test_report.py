"""What a calibration says it did."""

import torch
from torch import nn

from proxbit.posttraining import CalibrationReport, LayerFit, calibration_of

REPORT = CalibrationReport(
    1200, (LayerFit("a", 10, 4, 0.5, 0.25), LayerFit("b", 10, 4, 0.7, 0.05)), {"c": "its input is constant"}, 12.6
)


def test_it_says_what_was_fitted_and_what_was_left():
    text = str(REPORT)
    assert "fitted 2 layers to 1,200 images in 13 s; mean relative error 0.600 before, 0.150 after" in text
    assert text.index("a: 0.500 before, 0.250 after") < text.index("b: 0.700")
    assert "left as it came: c: its input is constant" in text
    assert CalibrationReport(1, (), {}, 0.0).after == 0


def test_it_stays_on_the_model():
    model = nn.Linear(2, 2)
    assert calibration_of(model) is None
    REPORT.attach(model)
    assert calibration_of(model) is model.calibration_report is REPORT
    assert set(model.state_dict()) == {"weight", "bias"} and isinstance(model(torch.ones(1, 2)), torch.Tensor)
