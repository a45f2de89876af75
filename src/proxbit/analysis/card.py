"""The quantization card: every choice that changes the accuracy of a quantized model, in one table."""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

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

# The type of a field, and the kind that the schema calls it. Null says that a value is unknown.
Text = Annotated[str | None, "text"]
Digest = Annotated[str | None, "digest"]
Whole = Annotated[int | None, "whole number"]
Number = Annotated[float | None, "number"]
YesOrNo = Annotated[bool | None, "yes or no"]
Texts = Annotated[list[str] | None, "texts"]
Numbers = Annotated[list[float] | None, "numbers"]
Wholes = Annotated[list[int] | None, "whole numbers"]
Counts = Annotated[dict[str, int] | None, "counts"]
Errors = Annotated[dict[str, dict[str, float]] | None, "errors"]
Files = Annotated[dict[str, dict[str, Any]] | None, "files"]

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


def _field(group: str, meaning: str) -> Any:
    return field(metadata={"group": group, "meaning": meaning})


_model, _weights, _inputs = (partial(_field, group) for group in ("model", "weights", "activations"))
_size, _work, _run = (partial(_field, group) for group in ("size", "computation", "training"))


@dataclass(frozen=True, kw_only=True)
class QuantizationCard:
    """A quantization card that is complete: each field has a value, or null where it is unknown.

    `CARD_FIELDS` says of each field what its value means, and of which kind it must be.

    Raises:
        CardError: for values of a wrong kind, or totals that do not add up.

    Source:
        Garg, Jain, Lou, Nahmias, Confounding Tradeoffs for Neural Network Quantization, arXiv 2102.06366: what a card
        must tell. The names of the fields are ours.
    """

    card_format: Whole = _model("version of this schema")
    model_id: Text = _model("name on the Hub")
    base_model: Text = _model("name on the Hub of the model that the training started from")
    model_class: Text = _model("class of the model")
    state: Text = _model("float, latent (simulated) or packed")
    checkpoint_sha: Digest = _model("SHA-256 of what sha256sum prints of the weight files, by name")
    files: Files = _model("bytes and SHA-256 of each weight file")
    weight_quantizer: Text = _weights("quantizer pair that trained the binarized weights")
    weight_bits: Number = _weights("of a binarized weight: log2 of the number of levels")
    weight_levels: Numbers = _weights("what a binarized weight can be, times its scale")
    weight_symmetry: Text = _weights("whether levels lie around zero, or around a stored offset")
    weight_granularity: Text = _weights("what shares one scale")
    scale_dtype: Text = _weights("of the scales, also those that come with packing")
    scale_count: Whole = _weights("scales and offsets, likewise")
    bias_bits: Whole = _weights("of the biases of binarized layers; 0 where there are none")
    first_layer_bits: Number = _weights("of a weight of the first linear or convolutional layer")
    last_layer_bits: Number = _weights("of a weight of the last such layer")
    mixed_precision_policy: Counts = _weights("such layers, by bits of weights (W) and inputs (A)")
    calibration_errors: Errors = _weights(
        "relative error of the output of each layer whose weights were fitted to data, before and after"
    )
    activation_bits: Wholes = _inputs("of the inputs of binarized layers")
    activation_symmetry: Texts = _inputs("where the levels of quantized inputs lie")
    activation_granularity: Texts = _inputs("what shares one step or scale")
    static_or_dynamic: Texts = _inputs("whether steps and scales are stored, or computed from each input")
    attention_prob_bits: Whole = _inputs("of the probabilities of attention; 0 without attention")
    softmax_layernorm_precision: Text = _inputs("dtype of normalizations, and of softmax")
    skip_precision: Text = _inputs("dtype of the residual stream")
    accumulator_bits: Wholes = _inputs("of the registers that sums of binarized layers end in")
    norm_folding: YesOrNo = _inputs("whether packed layers compute the normalization before them")
    calibration_observer: Texts = _inputs("what calibration of stored scales looked at")
    calibration_samples: Whole = _inputs("examples that it looked at")
    total_parameters: Whole = _size("weights and other saved numbers, without scales and offsets")
    binary_parameters: Whole = _size("of them, binarized weights")
    float_parameters: Whole = _size("of them, all others")
    total_bits: Whole = _size("of all saved tensors: scales, offsets and padding included")
    avg_weight_bits: Number = _size("total_bits / total_parameters")
    tensor_bytes: Whole = _size("of all saved tensors")
    header_bytes: Whole = _size("of the headers of the weight files, which hold names and shapes")
    model_bytes: Whole = _size("of the weight files")
    float32_bytes: Whole = _size("of the same model with every weight in float32, with this header")
    compression_ratio: Number = _size("float32_bytes / model_bytes")
    peak_activation_bytes: Whole = _work("of the largest output of one module, for one picture")
    binary_ops: Whole = _work("multiply-accumulates with a binarized weight, for one picture")
    float_ops: Whole = _work("all others, attention included")
    simulated_or_kernel: Text = _work("whether bits are simulated by floats, or multiplied by a kernel")
    latency_source: Text = _work("the machine that latencies were measured on")
    task: Text = _run("QAT, trained with quantized weights, or PTQ, not trained with them")
    dataset: Text = _run("trained on and evaluated on")
    split: Text = _run("the part of it that accuracies are of")
    epochs: Number = _run("passes over the training examples")
    labelled_samples: Whole = _run("labelled examples trained on")
    distillation_teacher: Text = _run("what was distilled from")
    seeds: Wholes = _run("of the runs that accuracies are of")
    baseline_top1: Number = _run("accuracy of the float model, a fraction")
    quantized_top1: Number = _run("accuracy of the packed model where it was evaluated, else of the hard one")
    std: Number = _run("standard deviation of quantized_top1 over seeds or folds")

    def __post_init__(self) -> None:
        _check(vars(self))
        if found := list(_contradictions(self)):
            raise _invalid(found)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizationCard":
        """A card of values by the names of its fields.

        Raises:
            CardError: also for fields that are missing or unknown.
        """
        _check(values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types, in the order of the schema."""
        ordered: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return ordered

    def to_markdown(self) -> str:
        """A Markdown table: field, value, meaning."""
        lines = ["| field | value | meaning |", "|---|---|---|"]
        for each in CARD_FIELDS:
            lines.append(f"| `{each.name}` | {cell(each.text(getattr(self, each.name)))} | {each.meaning} |")
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
        return cls.from_dict(dict.fromkeys(_ADDED) | values)


_KINDS = {name: get_args(hint)[1] for name, hint in get_type_hints(QuantizationCard, include_extras=True).items()}
CARD_FIELDS = tuple(Field(each.name, _KINDS[each.name], **each.metadata) for each in fields(QuantizationCard))


def _check(values: Mapping[str, Any]) -> None:
    if found := problems(CARD_FIELDS, values, complete=True):
        raise _invalid(found)


def _contradictions(card: QuantizationCard) -> Iterator[str]:
    for name, formula, parts, compute in _TOTALS:
        found, known = getattr(card, name), [getattr(card, part) for part in parts]
        if found is None or None in known:
            continue
        expected = compute(*known)
        right = math.isclose(found, expected) if isinstance(expected, float) else found == expected
        if not right:
            yield f"{name} is {found}, but {formula} is {expected}"


def _invalid(found: list[str]) -> CardError:
    more = f"; and {len(found) - MOST_TOLD:,} more" if len(found) > MOST_TOLD else ""
    return CardError(f"This quantization card is not valid: {'; '.join(found[:MOST_TOLD])}{more}.")


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
    return QuantizationCard.from_dict(
        {"card_format": CARD_FORMAT, **of_model, **of_files, **sizes, **_of_run(facts, of_model)}
    )


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
