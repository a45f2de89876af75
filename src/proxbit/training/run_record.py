"""The record of a run: what a Trainer knows of the training that cards tell and no model can."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import datasets
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from proxbit.analysis.card_facts import hub_name
from proxbit.analysis.environment import environment
from proxbit.analysis.run import check_run
from proxbit.quantizers import MuSchedule

__all__ = ["RunRecord", "run_record"]

# The fields of `analysis.run.RUN_FIELDS`, JSON types.
RunRecord = Mapping[str, Any]

# Of the many arguments of transformers, those that decide what comes out of a training.
_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "load_best_model_at_end",
    "metric_for_best_model",
)
_NO_METRICS = ("runtime", "per_second", "jit_compilation_time")


def run_record(
    trainer: Trainer,
    teacher: nn.Module | None,
    schedule: MuSchedule | None,
    calibration_samples: int | None,
    *,
    resumed: bool,
    others: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What a Trainer knows of its run.

    Args:
        trainer: after training, or before.
        teacher: of the distillation.
        schedule: of mu; None before training.
        calibration_samples: examples that activation quantizers were calibrated with, if this run did it.
        resumed: whether training went on from a checkpoint: the seconds before that are unknown.
        others: entries of the log that are evaluations of other data than `trainer.eval_dataset`.

    Returns:
        The fields of `analysis.run.RUN_FIELDS`, None for what is unknown.
    """
    args, state = trainer.args, trainer.state
    trained = state.global_step > 0
    return check_run(
        {
            "model_id": args.hub_model_id,
            "base_model": hub_name(trainer.model),
            "recipe": args.recipe,
            "arguments": _arguments(args, schedule),
            **_data(trainer.train_dataset, trainer.eval_dataset),
            "epochs": state.epoch if trained else None,
            "steps": state.global_step if trained else None,
            "train_seconds": None if resumed else _last(state.log_history, "train_runtime"),
            "seeds": [args.seed] if trained else None,
            "teacher": "none" if teacher is None else hub_name(teacher) or type(teacher).__name__,
            "calibration_samples": calibration_samples,
            "metrics": _metrics(trainer, others),
            "environment": _environment(args),
        }
    )


def _arguments(args: TrainingArguments, schedule: MuSchedule | None) -> dict[str, Any]:
    """The arguments of proxbit and those of `_ARGUMENTS`, with the mu that the run took for its defaults."""
    inherited = {field.name for field in fields(TrainingArguments)}
    own = [field.name for field in fields(args) if field.name not in inherited and field.name != "recipe"]
    values = args.to_dict()
    found = {name: values[name] for name in (*_ARGUMENTS, *own)}
    if schedule is not None:
        found |= {"mu_schedule": schedule.kind, "mu_start": schedule.start, "mu_end": schedule.end}
    return found


def _last(history: list[dict[str, Any]], key: str) -> Any:
    return next((entry[key] for entry in reversed(history) if key in entry), None)


def _data(train: Any, evaluation: Any) -> dict[str, Any]:
    """Names, parts and sizes of the data, as far as they know themselves."""
    one = next((data for data in (evaluation, train) if isinstance(data, datasets.Dataset)), None)
    found: dict[str, Any] = {"train_samples": _size(train), "eval_samples": _size(evaluation)}
    found |= {"train_split": _split(train), "split": _split(evaluation)}
    if found["split"] == found["train_split"] and evaluation is not train:
        found["split"] = None  # One part of it, as of `train_test_split`: which, nobody knows.
    if one is not None:
        known = _id_on_hub(one)
        # Data read from files have the name of their format.
        named = one.info.dataset_name if one.info.dataset_name != one.info.builder_name else None
        found |= {"dataset_id": known, "dataset": known or named, "dataset_config": one.config_name if known else None}
    return found


def _size(data: Any) -> int | None:
    return len(data) if data is not None and not isinstance(data, dict) and has_length(data) else None


def _split(data: Any) -> str | None:
    return str(data.split) if isinstance(data, datasets.Dataset) and data.split is not None else None


def _id_on_hub(data: datasets.Dataset) -> str | None:
    """The repository that the files of a data set were downloaded from."""
    urls = data.info.download_checksums or {}
    found = {match[1] for url in urls if (match := re.match(r"hf://datasets/([^@]+)@", url))}
    return found.pop() if len(found) == 1 else None


def _metrics(trainer: Trainer, others: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]] | None:
    """The hard and the soft metrics of the weights that the model has now: an older evaluation is of others."""
    state, data = trainer.state, trainer.eval_dataset
    best = trainer.args.load_best_model_at_end and state.best_global_step
    step = best or state.global_step
    prefixes = [f"{name}_" for name in data] if isinstance(data, dict) else [""]
    found: dict[str, dict[str, float]] = {"soft": {}, "hard": {}}
    for entry in state.log_history:
        if entry.get("step") != step or any(entry is other for other in others):
            continue
        for key, value in entry.items():
            name = key.removeprefix("eval_")
            if name == key or not isinstance(value, int | float) or name.endswith(_NO_METRICS):
                continue
            variant, name = _variant(name, prefixes)
            if variant in found:
                found[variant][name] = float(value)
    return {variant: values for variant, values in found.items() if values} or None


def _variant(name: str, prefixes: list[str]) -> tuple[str, str]:
    """Whether a metric is soft, hard or their gap, and its name without that, behind the prefix of its data set."""
    for prefix in prefixes:
        for variant in ("soft", "gap"):
            if name.startswith(f"{prefix}{variant}_"):
                return variant, prefix + name.removeprefix(f"{prefix}{variant}_")
    return "hard", name


def _environment(args: TrainingArguments) -> dict[str, Any]:
    here = environment()
    return {
        **here.versions,
        "processor": here.cpu,
        "cores": here.cores,
        "threads": here.threads,
        "device": str(args.device),
        "processes": args.world_size,
    }
