"""`CalibrationReport`: what became of every layer when its weights were fitted to data."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from torch import nn

__all__ = ["CalibrationReport", "LayerFit", "calibration_of"]

_ATTRIBUTE = "calibration_report"


@dataclass(frozen=True)
class LayerFit:
    """What became of a layer.

    Attributes:
        name: as in `model.named_modules()`.
        tokens: rows of inputs that were looked at; of a convolution, positions.
        columns: inputs of a row of its weight.
        before: E|y - Q x - b|^2 / E|y - E y|^2, where y is what the float layer gives in the float model, x the inputs
            that there are once all layers before are binarized, Q and b the layer as it came, signs of its latents.
        after: the same of the layer as it is now.
    """

    name: str
    tokens: int
    columns: int
    before: float
    after: float


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` did with the weights of a model.

    Attributes:
        images: that were looked at.
        layers: in the order in which they compute.
        left: names of latent layers that were left as they came, with the reason.
        seconds: that it took.
    """

    images: int
    layers: tuple[LayerFit, ...]
    left: Mapping[str, str]
    seconds: float

    @property
    def before(self) -> float:
        """The mean of the layers' errors before."""
        return fmean(layer.before for layer in self.layers) if self.layers else 0.0

    @property
    def after(self) -> float:
        """The mean of the layers' errors after."""
        return fmean(layer.after for layer in self.layers) if self.layers else 0.0

    def attach(self, model: nn.Module) -> None:
        """Leave the report on the model, as `model.calibration_report`."""
        model.__dict__[_ATTRIBUTE] = self

    def __str__(self) -> str:
        worst = sorted(self.layers, key=lambda layer: -layer.after)[:3]
        lines = [
            f"fitted {len(self.layers)} layers to {self.images:,} images in {self.seconds:.0f} s; "
            f"mean relative error {self.before:.3f} before, {self.after:.3f} after",
            *(f"  largest: {layer.name}: {layer.before:.3f} before, {layer.after:.3f} after" for layer in worst),
            *(f"  left as it came: {name}: {reason}" for name, reason in self.left.items()),
        ]
        return "\n".join(lines)


def calibration_of(model: nn.Module) -> CalibrationReport | None:
    """The report that `calibrate` left on a model, if its weights were fitted in this process."""
    report = vars(model).get(_ATTRIBUTE)
    return report if isinstance(report, CalibrationReport) else None
