"""`BinarizationReport`: every module that could have been converted, what became of it, and why."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from proxbit.foreign import printable

__all__ = ["BinarizationReport", "ModuleDecision"]


@dataclass(frozen=True)
class ModuleDecision:
    """What was decided for one module.

    Args:
        name: as in `model.named_modules()`.
        kind: its class, such as "Linear".
        parameters: elements of its weight.
        converted: whether it changes.
        reason: why, in a few words.
    """

    name: str
    kind: str
    parameters: int
    converted: bool
    reason: str


@dataclass(frozen=True)
class BinarizationReport:
    """The decisions of one `binarize`, `pack` or `dequantize`.

    Args:
        action: "binarized", "packed" or "dequantized".
        decisions: one for each module with a weight that could be binary.
    """

    action: str
    decisions: tuple[ModuleDecision, ...]

    @property
    def converted(self) -> tuple[str, ...]:
        """Names of the modules that changed."""
        return tuple(decision.name for decision in self.decisions if decision.converted)

    @property
    def left(self) -> dict[str, str]:
        """Names of the modules that were left as they are, with the reason."""
        return {decision.name: decision.reason for decision in self.decisions if not decision.converted}

    def attach(self, model: nn.Module) -> None:
        """Leave the report on the model, as `model.binarization_report`."""
        model.__dict__["binarization_report"] = self

    def __str__(self) -> str:
        weights = sum(decision.parameters for decision in self.decisions if decision.converted)
        total = sum(decision.parameters for decision in self.decisions)
        lines = [
            f"{self.action} {len(self.converted)} of {len(self.decisions)} modules, {weights:,} of {total:,} weights"
        ]
        for converted, title in ((True, self.action), (False, "left as they are")):
            reasons = Counter(decision.reason for decision in self.decisions if decision.converted is converted)
            for reason, count in reasons.items():
                names = [d.name for d in self.decisions if d.converted is converted and d.reason == reason]
                shown = ", ".join(map(printable, names[:3])) + (", ..." if count > 3 else "")
                lines.append(f"  {title}: {count} ({printable(reason)}): {shown}")
        return "\n".join(lines)
