"""What a record of a training run may say: the facts of cards that no model can tell."""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from proxbit.analysis.schema import Field, problems
from proxbit.errors import CardError

__all__ = ["RUN_FIELDS", "VARIANTS", "check_run", "without_places"]

# A path from a root, a home or a drive on, as a whole and up to its last part inside of a line.
_ROOTED = re.compile(r"(?:[A-Za-z]:)?[/\\]|~|\.\.?(?:[/\\]|$)")
_ABOVE = re.compile(r"(?<![\w./\\:~-])(?:~[\w.-]*|[A-Za-z]:)?(?:/|\\)(?:[^\s/\\'\",;]+[/\\])+(?=[^\s/\\])")

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


def without_places(value: Any) -> Any:
    """A value of JSON types whose texts say nothing of where files lie: of each path no more than the last part.

    Examples:
        >>> without_places({"dataset": "/home/me/patients", "arguments": ["train --data /srv/me/patients", "me/vit"]})
        {'dataset': 'patients', 'arguments': ['train --data patients', 'me/vit']}
    """
    if isinstance(value, dict):
        return {key: without_places(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(each) for each in value]
    if not isinstance(value, str):
        return value
    if _ROOTED.match(value) and "\n" not in value:
        return _last_part(value)
    return _ABOVE.sub("", value)


def _last_part(path: str) -> str:
    """The name of a file or folder; of the one that this is run in, as "." is called, where that lies."""
    kind = PureWindowsPath if "\\" in path or re.match("[A-Za-z]:", path) else PurePosixPath
    name = kind(path).name
    if name in ("", ".", ".."):
        name = Path(path).resolve().name
    return name if name not in ("", "~") else "data"


def check_run(run: Mapping[str, Any] | None) -> dict[str, Any]:
    """A record of a run with every field, null where nothing is known. It is published with a model: of folders on this
    machine it has the names only.

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
    dataset = given.get("dataset")
    if isinstance(dataset, str) and os.path.isdir(dataset):
        given["dataset"] = _last_part(dataset)
    return {field.name: without_places(given.get(field.name)) for field in RUN_FIELDS}
