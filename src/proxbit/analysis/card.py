"""The quantization card: every choice that changes the accuracy of a quantized model, in one table."""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from proxbit.analysis.card_facts import checkpoint_sha, file_facts, hub_name, model_facts
from proxbit.analysis.run import check_run
from proxbit.analysis.schema import Field, cell, problems
from proxbit.checkpoint.files import CARD_NAME, read_json
from proxbit.checkpoint.weights import save_weights
from proxbit.errors import CardError, CheckpointError
from proxbit.foreign import printable

__all__ = ["CARD_FIELDS", "CARD_FORMAT", "CARD_NAME", "QuantizationCard", "quantization_card"]

CARD_FORMAT = 1
MOST_TOLD = 10  # of what is wrong with a card
# Fields that cards of earlier versions do not have.
_ADDED = ("calibration_errors",)

_MODEL, _WEIGHTS, _INPUTS, _SIZE, _WORK, _RUN = "model", "weights", "activations", "size", "computation", "training"

CARD_FIELDS: tuple[Field, ...] = (
    Field("card_format", "whole number", "version of this schema", _MODEL),
    Field("model_id", "text", "name on the Hub", _MODEL),
    Field("base_model", "text", "name on the Hub of the model that the training started from", _MODEL),
    Field("model_class", "text", "class of the model", _MODEL),
    Field("state", "text", "float, latent (simulated) or packed", _MODEL),
    Field("checkpoint_sha", "digest", "SHA-256 of what sha256sum prints of the weight files, by name", _MODEL),
    Field("files", "files", "bytes and SHA-256 of each weight file", _MODEL),
    Field("weight_quantizer", "text", "quantizer pair that trained the binarized weights", _WEIGHTS),
    Field("weight_bits", "number", "of a binarized weight: log2 of the number of levels", _WEIGHTS),
    Field("weight_levels", "numbers", "what a binarized weight can be, times its scale", _WEIGHTS),
    Field("weight_symmetry", "text", "whether levels lie around zero, or around a stored offset", _WEIGHTS),
    Field("weight_granularity", "text", "what shares one scale", _WEIGHTS),
    Field("scale_dtype", "text", "of the scales, also those that come with packing", _WEIGHTS),
    Field("scale_count", "whole number", "scales and offsets, likewise", _WEIGHTS),
    Field("bias_bits", "whole number", "of the biases of binarized layers; 0 where there are none", _WEIGHTS),
    Field("first_layer_bits", "number", "of a weight of the first linear or convolutional layer", _WEIGHTS),
    Field("last_layer_bits", "number", "of a weight of the last such layer", _WEIGHTS),
    Field("mixed_precision_policy", "counts", "such layers, by bits of weights (W) and inputs (A)", _WEIGHTS),
    Field(
        "calibration_errors",
        "errors",
        "relative error of the output of each layer whose weights were fitted to data, before and after",
        _WEIGHTS,
    ),
    Field("activation_bits", "whole numbers", "of the inputs of binarized layers", _INPUTS),
    Field("activation_symmetry", "texts", "where the levels of quantized inputs lie", _INPUTS),
    Field("activation_granularity", "texts", "what shares one step or scale", _INPUTS),
    Field("static_or_dynamic", "texts", "whether steps and scales are stored, or computed from each input", _INPUTS),
    Field("attention_prob_bits", "whole number", "of the probabilities of attention; 0 without attention", _INPUTS),
    Field("softmax_layernorm_precision", "text", "dtype of normalizations, and of softmax", _INPUTS),
    Field("skip_precision", "text", "dtype of the residual stream", _INPUTS),
    Field("accumulator_bits", "whole numbers", "of the registers that sums of binarized layers end in", _INPUTS),
    Field("norm_folding", "yes or no", "whether packed layers compute the normalization before them", _INPUTS),
    Field("calibration_observer", "texts", "what calibration of stored scales looked at", _INPUTS),
    Field("calibration_samples", "whole number", "examples that it looked at", _INPUTS),
    Field("total_parameters", "whole number", "weights and other saved numbers, without scales and offsets", _SIZE),
    Field("binary_parameters", "whole number", "of them, binarized weights", _SIZE),
    Field("float_parameters", "whole number", "of them, all others", _SIZE),
    Field("total_bits", "whole number", "of all saved tensors: scales, offsets and padding included", _SIZE),
    Field("avg_weight_bits", "number", "total_bits / total_parameters", _SIZE),
    Field("tensor_bytes", "whole number", "of all saved tensors", _SIZE),
    Field("header_bytes", "whole number", "of the headers of the weight files, which hold names and shapes", _SIZE),
    Field("model_bytes", "whole number", "of the weight files", _SIZE),
    Field("float32_bytes", "whole number", "of the same model with every weight in float32, with this header", _SIZE),
    Field("compression_ratio", "number", "float32_bytes / model_bytes", _SIZE),
    Field("peak_activation_bytes", "whole number", "of the largest output of one module, for one picture", _WORK),
    Field("binary_ops", "whole number", "multiply-accumulates with a binarized weight, for one picture", _WORK),
    Field("float_ops", "whole number", "all others, attention included", _WORK),
    Field("simulated_or_kernel", "text", "whether bits are simulated by floats, or multiplied by a kernel", _WORK),
    Field("latency_source", "text", "the machine that latencies were measured on", _WORK),
    Field("task", "text", "QAT, trained with quantized weights, or PTQ, not trained with them", _RUN),
    Field("dataset", "text", "trained on and evaluated on", _RUN),
    Field("split", "text", "the part of it that accuracies are of", _RUN),
    Field("epochs", "number", "passes over the training examples", _RUN),
    Field("labelled_samples", "whole number", "labelled examples trained on", _RUN),
    Field("distillation_teacher", "text", "what was distilled from", _RUN),
    Field("seeds", "whole numbers", "of the runs that accuracies are of", _RUN),
    Field("baseline_top1", "number", "accuracy of the float model, a fraction", _RUN),
    Field(
        "quantized_top1", "number", "accuracy of the packed model where it was evaluated, else of the hard one", _RUN
    ),
    Field("std", "number", "standard deviation of quantized_top1 over seeds or folds", _RUN),
)

# What must equal what. A total is checked where all of its parts are known.
_TOTALS: tuple[tuple[str, str, tuple[str, ...], Callable[..., Any]], ...] = (
    ("checkpoint_sha", "SHA-256 of the listing of files", ("files",), checkpoint_sha),
    ("model_bytes", "sum of the bytes of files", ("files",), lambda files: sum(f["bytes"] for f in files.values())),
    ("model_bytes", "tensor_bytes + header_bytes", ("tensor_bytes", "header_bytes"), lambda a, b: a + b),
    ("total_bits", "8 tensor_bytes", ("tensor_bytes",), lambda tensors: 8 * tensors),
    (
        "total_parameters",
        "binary_parameters + float_parameters",
        ("binary_parameters", "float_parameters"),
        lambda a, b: a + b,
    ),
    (
        "avg_weight_bits",
        "total_bits / total_parameters",
        ("total_bits", "total_parameters"),
        lambda bits, count: bits / max(1, count),
    ),
    (
        "compression_ratio",
        "float32_bytes / model_bytes",
        ("float32_bytes", "model_bytes"),
        lambda float32, now: float32 / max(1, now),
    ),
)


def _contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    for name, formula, parts, compute in _TOTALS:
        if values[name] is None or any(values[part] is None for part in parts):
            continue
        expected = compute(*(values[part] for part in parts))
        right = math.isclose(values[name], expected) if isinstance(expected, float) else values[name] == expected
        if not right:
            yield f"{name} is {values[name]}, but {formula} is {expected}"


def _told(found: list[str]) -> str:
    more = f"; and {len(found) - MOST_TOLD:,} more" if len(found) > MOST_TOLD else ""
    return "; ".join(found[:MOST_TOLD]) + more


@dataclass(frozen=True)
class QuantizationCard:
    """A quantization card that is complete: each field of `CARD_FIELDS` has a value, or null where it is unknown.

    Args:
        values: by the names of the fields.

    Raises:
        CardError: for fields that are missing or unknown, values of a wrong kind, or totals that do not add up.

    Source:
        Garg, Jain, Lou, Nahmias, Confounding Tradeoffs for Neural Network Quantization, arXiv 2102.06366: what a card
        must tell. The names of the fields are ours.
    """

    values: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", dict(self.values))
        found = problems(CARD_FIELDS, self.values, complete=True) or list(_contradictions(self.values))
        if found:
            raise CardError(f"This quantization card is not valid: {_told(found)}.")

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types, in the order of the schema."""
        ordered: dict[str, Any] = json.loads(json.dumps({field.name: self.values[field.name] for field in CARD_FIELDS}))
        return ordered

    def to_markdown(self) -> str:
        """A Markdown table: field, value, meaning."""
        lines = ["| field | value | meaning |", "|---|---|---|"]
        for field in CARD_FIELDS:
            text = cell(field.text(self.values[field.name]))
            lines.append(f"| `{field.name}` | {text} | {field.meaning} |")
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Write the card as JSON; into a folder under the name that loading looks for, `quantization_card.json`."""
        path = Path(path)
        file = path / CARD_NAME if path.is_dir() else path
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        # Half of a pair of surrogates, which JSON may hold and UTF-8 may not, is written as JSON escapes it.
        file.write_text(text, encoding="utf-8", errors="backslashreplace")
        return file

    @classmethod
    def load(cls, path: str | Path) -> "QuantizationCard":
        """Read a card: a JSON file, or the folder that holds `quantization_card.json`.

        Raises:
            CardError: if there is no such file, or it is no valid card.
        """
        path = Path(path)
        file = path / CARD_NAME if path.is_dir() else path
        try:
            values = read_json(file)
        except CheckpointError as error:
            raise CardError(f"{file} cannot be read as a quantization card: {error}") from error
        if not isinstance(values, dict):
            raise CardError(f"{file} is no quantization card: it holds no JSON object.")
        if values.get("card_format") != CARD_FORMAT:
            found = printable(repr(values.get("card_format")))
            raise CardError(f"{file} has card_format {found}; this proxbit reads {CARD_FORMAT}.")
        return cls(dict.fromkeys(_ADDED) | values)


def quantization_card(
    model: nn.Module, *, run: Mapping[str, Any] | None = None, files: Sequence[str | Path] | None = None
) -> QuantizationCard:
    """Compute the quantization card of a model.

    Args:
        model: in any state.
        run: facts of the training, see `RUN_FIELDS`; what it does not say is null in the card.
        files: the weight files of the model. None: it is saved into a temporary folder, whose files are measured.

    Raises:
        CardError: if the run is not valid, or the files are not those of the model.
    """
    facts = check_run({"base_model": hub_name(model), **(run or {})})
    if files is None:
        with tempfile.TemporaryDirectory() as folder:
            of_files = file_facts(save_weights(model, folder))
    else:
        of_files = file_facts([Path(file) for file in files])
    of_model = model_facts(model)
    float32_bytes = of_model.pop("float32_tensor_bytes") + of_files["header_bytes"]
    sizes = {"float32_bytes": float32_bytes, "compression_ratio": float32_bytes / max(1, of_files["model_bytes"])}
    return QuantizationCard({"card_format": CARD_FORMAT, **of_model, **of_files, **sizes, **_of_run(facts, of_model)})


def _of_run(run: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a card that the record of a run tells."""
    metrics, latency = run["metrics"] or {}, run["latency"] or {}
    accuracy = {variant: values.get("accuracy") for variant, values in metrics.items()}
    quantized = accuracy.get("packed")
    steps = run["steps"]
    return {
        "model_id": run["model_id"],
        "base_model": run["base_model"],
        "task": None if steps is None or model["state"] == "float" else "QAT" if steps else "PTQ",
        "dataset": run["dataset"],
        "split": run["split"],
        "epochs": run["epochs"],
        "labelled_samples": run["train_samples"],
        "distillation_teacher": run["teacher"],
        "seeds": run["seeds"],
        "std": run["std"],
        "baseline_top1": accuracy.get("float"),
        "quantized_top1": accuracy.get("hard") if quantized is None else quantized,
        "latency_source": latency.get("machine"),
        "calibration_samples": model["calibration_samples"]
        if run["calibration_samples"] is None
        else run["calibration_samples"],
    }
