"""What a record of a training run may say: the facts of cards that no model can tell."""

from collections.abc import Mapping
from typing import Any

from proxbit.analysis.schema import Field, problems
from proxbit.errors import CardError

__all__ = ["RUN_FIELDS", "VARIANTS", "check_run"]

VARIANTS = {
    "float": "float",
    "soft": "latent, soft (simulated)",
    "hard": "latent, hard (simulated)",
    "packed": "packed",
}

RUN_FIELDS: tuple[Field, ...] = (
    Field("model_id", "text", "name of this model on the Hub"),
    Field("base_model", "text", "name on the Hub of the model that the training started from"),
    Field("license", "text", "of this model, as the Hub spells it"),
    Field("recipe", "text", "name of the recipe"),
    Field("arguments", "object", "the arguments of the training that matter for its result"),
    Field("dataset", "text", "what the data set is called"),
    Field("dataset_id", "text", "its name on the Hub"),
    Field("dataset_config", "text", "its configuration there"),
    Field("train_split", "text", "the part that was trained on"),
    Field("split", "text", "the part that the metrics are of"),
    Field("train_samples", "whole number", "labelled examples trained on"),
    Field("eval_samples", "whole number", "examples that the metrics are of"),
    Field("epochs", "number", "passes over the training examples"),
    Field("steps", "whole number", "optimizer steps"),
    Field("train_seconds", "number", "seconds that the training took"),
    Field("seeds", "whole numbers", "of the runs that the metrics are of"),
    Field("std", "number", "standard deviation of the accuracy over seeds or folds, a fraction"),
    Field("teacher", "text", 'what was distilled from; "none" without a teacher'),
    Field("calibration_samples", "whole number", "examples that activation quantizers were calibrated with"),
    Field("metrics", "metrics", f"by variant ({', '.join(VARIANTS)}), then by name; accuracies are fractions"),
    Field("latency", "latency", "milliseconds of a forward pass, by variant: what `measure_latency` gives"),
    Field("environment", "object", "versions, processor and device of the training"),
)


def check_run(run: Mapping[str, Any] | None) -> dict[str, Any]:
    """A record of a run with every field, null where nothing is known.

    Raises:
        CardError: for fields that do not exist, values of a wrong kind, or metrics of an unknown variant.
    """
    given = dict(run or {})
    found = problems(RUN_FIELDS, given, complete=False)
    if not found:
        strange = sorted(set(given.get("metrics") or ()) - set(VARIANTS))
        found = [f"metrics: {name!r} is no variant; valid: {', '.join(VARIANTS)}" for name in strange]
    if found:
        names = ", ".join(field.name for field in RUN_FIELDS)
        raise CardError(f"This record of a run is not valid: {'; '.join(found)}. Fields: {names}.")
    return {field.name: given.get(field.name) for field in RUN_FIELDS}
