"""The model card of a release: `README.md`, from the quantization card, the model and the record of its training."""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from proxbit.analysis.card import QuantizationCard
from proxbit.analysis.run import RUN_FIELDS, VARIANTS, check_run
from proxbit.analysis.schema import KINDS, MOST, cell, line
from proxbit.foreign import printable
from proxbit.nn.attention import ATTENTIONS
from proxbit.patching import blank_image

__all__ = ["README", "is_card", "model_card", "pipeline_tag", "rename"]

README = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
SHOWN_LABELS, NAME = 20, 100  # labels, and characters of one
MADE = "made with proxbit (ProxConnect++)"
# Facts of a run that have a place of their own.
_ELSEWHERE = {"model_id", "calibration_samples", "metrics", "latency", "std", "split", "eval_samples"}
_LABELLED = {"image-classification", "object-detection", "image-segmentation"}

# Pipelines that take an image alone, and the classes that they run.
_PIPELINES = {
    "image-classification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "object-detection": auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    "image-segmentation": {
        **auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
        **auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
    },
    "depth-estimation": auto.MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES,
    "image-feature-extraction": auto.MODEL_MAPPING_NAMES,
}

_PIPELINE_SNIPPET = """\
import proxbit  # registers the plug-in with transformers
from transformers import pipeline

model = pipeline("{tag}", model={model})
{attention}print(model("picture.jpg"))"""

_MODEL_SNIPPET = """\
import proxbit  # registers the plug-in with transformers
{torch}from transformers import {model_class}

model = {model_class}.from_pretrained({model})
{attention}{call}"""

_CALL = """\
picture = torch.zeros({shape})  # a batch of one; prepared as in the training
with torch.inference_mode():
    print(model(pixel_values=picture))"""


def pipeline_tag(model: PreTrainedModel) -> str | None:
    """The pipeline of transformers that runs a model on an image; None if there is none."""
    if model.main_input_name != "pixel_values":
        return None
    for tag, classes in _PIPELINES.items():
        names = {name for each in classes.values() for name in ([each] if isinstance(each, str) else each)}
        if type(model).__name__ in names:
            return tag
    return None


def model_card(
    model: PreTrainedModel,
    card: QuantizationCard,
    *,
    run: Mapping[str, Any] | None = None,
    name: str | None = None,
    processing_class: Any = None,
    tags: tuple[str, ...] = (),
    **metadata: Any,
) -> ModelCard:
    """Write the model card.

    What is unknown is left out of the metadata, and said to be unknown in the text.

    Args:
        model: what the card is of.
        card: its quantization card.
        run: facts of the training, see `analysis.run.RUN_FIELDS`.
        name: the title; the name on the Hub by default, or the class of the model.
        processing_class: whatever is saved beside the model to prepare its inputs.
        tags: to add to those that follow from the model.
        **metadata: other fields of `huggingface_hub.ModelCardData`, such as `language`; they win.

    Returns:
        A card of `huggingface_hub`; `save(path)` writes it.

    Raises:
        CardError: if the record of the run is not valid.
        ValueError: from `huggingface_hub`, for metadata that are none.
    """
    facts = check_run(run)
    title = printable(" ".join((name or facts["model_id"] or card.model_class or "unknown").split()))
    data = _metadata(model, card, facts, title, tags, metadata)
    made: ModelCard = ModelCard.from_template(
        ModelCardData(**data),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=line(title),
        summary=_summary(card, type(model).__name__),
        snippet=_snippet(
            model, card, data.get("pipeline_tag"), processing_class, printable(facts["model_id"] or title)
        ),
        use=_use(model, card, data.get("pipeline_tag")),
        limits=list(_limits(card, facts)),
        training=_fitting(card) + _training(facts, card),
        results=_results(facts),
        size=_size(card),
        latency=_latency(facts),
        quantization_card=card.to_markdown(),
    )
    return made


def is_card(text: str) -> bool:
    """Whether `model_card` wrote a text, if only most of it."""
    return MADE in text


def rename(text: str, model_id: str | None, repo: str) -> str:
    """Give a model card that was written before the place on the Hub was known that place: in its title, in the name of
    its results, in the code that loads the model, and in the table. Every other line stays, as does a card without that
    table, which somebody else wrote.

    Args:
        text: of the card.
        model_id: the name that the quantization card beside it has.
        repo: owner/name.
    """
    own = f"`model_id` | {cell(model_id or 'unknown')} | name on the Hub |"
    if own not in text:  # Somebody wrote it.
        return text
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    title, name = found[1] if found else "", repo.rpartition("/")[2]
    old, new = json.dumps(model_id or title), json.dumps(repo)
    ends = {
        f"\n# {title}": f"\n# {name}",
        f"\n- name: {title}": f"\n- name: {name}",
        f"model={old})": f"model={new})",
        f".from_pretrained({old})": f".from_pretrained({new})",
        own: f"`model_id` | {repo} | name on the Hub |",
    }
    for before, after in ends.items():
        text = text.replace(f"{before}\n", f"{after}\n")
    return text


def _metadata(
    model: PreTrainedModel,
    card: QuantizationCard,
    run: Mapping[str, Any],
    title: str,
    tags: tuple[str, ...],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    tag = pipeline_tag(model)
    results = list(_eval_results(run, tag))
    state = ["1-bit", "packed"] if card.state == "packed" else [card.state or "unknown"]
    data = {
        "license": run["license"],
        "base_model": card.base_model,
        "pipeline_tag": tag,
        "library_name": "transformers",
        "datasets": [run["dataset_id"]] if run["dataset_id"] else None,
        "metrics": list(dict.fromkeys(result.metric_type for result in results)) or None,
        "tags": ["proxbit", "quantization", "binarization", *state, *tags],
        "eval_results": results or None,
        "model_name": title if results else None,
        **given,
    }
    return {key: value for key, value in data.items() if value is not None}


def _shipped(metrics: Mapping[str, Any]) -> str | None:
    """The variant whose metrics are those of what ships."""
    return next((variant for variant in ("packed", "hard") if metrics.get(variant)), None)


def _eval_results(run: Mapping[str, Any], tag: str | None) -> Iterator[EvalResult]:
    """Of what ships, as the Hub shows them: they need a task and a data set with a name."""
    metrics, dataset = run["metrics"] or {}, run["dataset_id"] or run["dataset"]
    variant = _shipped(metrics)
    if variant is None or dataset is None or tag is None:
        return
    for metric, value in metrics[variant].items():
        if metric != "loss":
            yield EvalResult(
                task_type=tag,
                dataset_type=dataset,
                dataset_name=printable(run["dataset"] or dataset, NAME),
                dataset_config=run["dataset_config"],
                dataset_split=run["split"],
                metric_type=metric,
                metric_name=f"{metric} ({VARIANTS[variant]})",
                metric_value=value,
            )


def _shown(number: float | None, form: str = ",") -> str:
    return "unknown" if number is None else format(number, form)


def _summary(card: QuantizationCard, kind: str) -> str:
    binary, total = card.binary_parameters, card.total_parameters
    share = "an unknown share" if binary is None or total is None else f"{binary / max(1, total):.1%}"
    if card.state == "packed":
        return (
            f"A 1-bit `{kind}`, {MADE}: {share} of its {_shown(total)} parameters are one bit each. Its weights take "
            f"{_shown(card.model_bytes)} bytes, {_shown(card.compression_ratio, '.1f')}x smaller than in float32."
        )
    return (
        f"A latent checkpoint of a `{kind}`, {MADE}: to be trained on, or to be packed by "
        f"`proxbit.pack(model)`. It is simulated, and as large as a float model; once packed, {share} of its "
        f"{_shown(total)} parameters are one bit each."
    )


def _snippet(model: PreTrainedModel, card: QuantizationCard, tag: str | None, processor: Any, where: str) -> str:
    name = json.dumps(where)  # A name with quotes stays a name.
    chosen = model.config._attn_implementation  # which is in no checkpoint
    setter = f'set_attn_implementation("{chosen}")\n' if chosen in ATTENTIONS else ""
    if tag is not None and processor is not None:
        return _PIPELINE_SNIPPET.format(tag=tag, model=name, attention=setter and f"model.model.{setter}")
    call = "print(model)"
    if card.peak_activation_bytes is not None:  # It takes an image alone.
        call = _CALL.format(shape=", ".join(map(str, blank_image(model)["pixel_values"].shape)))
    return _MODEL_SNIPPET.format(
        torch="import torch\n" if "torch." in call else "",
        model_class=type(model).__name__,
        model=name,
        attention=setter and f"model.{setter}",
        call=call,
    )


def _use(model: PreTrainedModel, card: QuantizationCard, tag: str | None) -> str:
    parts = [f"Task: {tag}." if tag else "Its task is not one of the pipelines that take a picture alone."]
    labels = [str(label) for _, label in sorted(model.config.id2label.items())] if tag in _LABELLED else []
    if labels and not all(label.startswith("LABEL_") for label in labels):
        more = f", and {len(labels) - SHOWN_LABELS} more" if len(labels) > SHOWN_LABELS else ""
        shown = ", ".join(line(label, NAME) for label in labels[:SHOWN_LABELS])
        parts.append(f"It tells {len(labels)} classes apart: {shown}{more}.")
    elif labels:
        parts.append(f"It tells {len(labels)} classes apart, whose names are unknown.")
    if card.state == "packed":
        parts.append("It is for machines with little memory: the weights stay packed while it runs.")
    return " ".join(parts)


def _limits(card: QuantizationCard, run: Mapping[str, Any]) -> Iterator[str]:
    """What follows from the facts; nothing is claimed that nobody looked at."""
    if card.state == "packed":
        yield "It cannot be trained on: that takes its latent checkpoint."
    else:
        yield "It is simulated: neither small nor fast until it is packed."
    metrics, dataset = run["metrics"] or {}, run["dataset"] or run["dataset_id"]
    if _shipped(metrics) is None:
        yield "Its accuracy is unknown: no evaluation is recorded."
    elif dataset:
        yield f"It was evaluated on {line(dataset, NAME)} only; how it does on other pictures is unknown."
    else:
        yield "The data of its evaluation are not recorded; how it does on other pictures is unknown."
    if metrics and "packed" not in metrics and card.state == "packed":
        yield "The packed model itself was not evaluated: the results are of its simulation."
    if run["std"] is None:
        yield "How much results differ between seeds is unknown."
    yield "Fairness between groups, and robustness against changed pictures, are unknown."
    if card.base_model:
        yield f"It inherits the limits of {line(card.base_model, NAME)}."
    if run["license"] is None:
        yield "Its license is unknown: ask before using it."


def _fitting(card: QuantizationCard) -> str:
    """Of weights that were fitted to images, what was done with them."""
    errors = card.calibration_errors
    if not errors:
        return ""
    told = KINDS["errors"].show(errors)
    start = "then trained" if card.task == "QAT" else "without training"
    images = "some" if card.calibration_samples is None else f"{card.calibration_samples:,}"
    return (
        f"Its weights were fitted in closed form to {images} images without labels, {start}. Relative error of the "
        f"outputs of {line(told)}.\n\n"
    )


def _training(run: Mapping[str, Any], card: QuantizationCard) -> str:
    shown = [field for field in RUN_FIELDS if field.name not in _ELSEWHERE and run[field.name] is not None]
    if not shown:
        return "How it was trained is unknown."
    unknown = [field.name for field in RUN_FIELDS if field.name not in _ELSEWHERE and run[field.name] is None]
    lines = [f"Quantizer pair of the weights: {line(card.weight_quantizer or 'unknown', NAME)}.", ""]
    lines += ["| | | |", "|---|---|---|"]
    for field in shown:
        lines.append(f"| `{field.name}` | {cell(field.text(run[field.name]))} | {field.meaning} |")
    if unknown:
        lines += ["", f"Unknown: {', '.join(f'`{name}`' for name in unknown)}."]
    return "\n".join(lines)


def _results(run: Mapping[str, Any]) -> str:
    metrics = run["metrics"] or {}
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))[:SHOWN_LABELS]
    if not names:
        return "Unknown: no evaluation is recorded."
    number = KINDS["number"].show
    lines = [f"| model | {' | '.join(cell(name, NAME) for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for variant, title in VARIANTS.items():
        values = metrics.get(variant, {})
        cells = [number(values[name]) if name in values else "unknown" for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    where = [run["dataset"] or run["dataset_id"] or "a data set whose name is unknown", run["split"]]
    of = f"Of {', '.join(line(part, NAME) for part in where if part)}"
    samples = f"; {run['eval_samples']:,} examples" if run["eval_samples"] is not None else ""
    spread = f"; standard deviation of the accuracy {number(run['std'])}" if run["std"] is not None else ""
    return "\n".join([*lines, "", f"{of}{samples}{spread}. Accuracies are fractions. A latent model is simulated."])


def _size(card: QuantizationCard) -> str:
    files = card.files or {}
    lines = ["| | bytes |", "|---|---|"]
    lines += [f"| {cell(name, NAME)} | {facts['bytes']:,} |" for name, facts in islice(files.items(), MOST)]
    if len(files) > 1:
        lines.append(f"| all weight files | {_shown(card.model_bytes)} |")
    lines.append(f"| the same model in float32 | {_shown(card.float32_bytes)} |")
    average = f"{_shown(card.avg_weight_bits, '.2f')} bits a parameter on average, everything counted."
    return "\n".join([*lines, "", average])


def _latency(run: Mapping[str, Any]) -> str:
    latency = run["latency"]
    if not latency:
        return "Not measured. `proxbit bench MODEL` measures it, on the machine that it is to run on."
    lines = ["| model | ms | spread |", "|---|---|---|"]
    spread = latency["spread"]
    lines += [f"| {cell(name, NAME)} | {ms:.2f} | {spread[name]:.0%} |" for name, ms in latency["milliseconds"].items()]
    how = f"Of a forward pass with {latency['batch']} picture(s): medians of {latency['rounds']} rounds, and the "
    return "\n".join([*lines, "", f"{how}distance of the quartiles. Machine: {line(latency['machine'], 2 * NAME)}."])
