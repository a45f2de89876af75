"""The recorder of what `proxbit report` shows beside the Trainer's own log: layers, and images of evaluations."""

import base64
import io
import logging
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy

from proxbit.analysis.environment import environment
from proxbit.analysis.run_log import RUN_LOG, append_event, read_log, replace_event, start_log
from proxbit.analysis.summary import summary
from proxbit.errors import UnknownNameError
from proxbit.foreign import first_line
from proxbit.nn import LatentWeight, latent_layers
from proxbit.plugin.sharded import full_latents
from proxbit.quantizers import pair_key
from proxbit.training.monitor import LATENT_EDGES, FlipCounter, latent_histogram

__all__ = ["Gallery", "RunRecorder", "choose", "start_file"]

# Images of each kind, and the longest side that is kept, in pixels: about 500 kB at most.
IMAGES = 12
SIDE = 96
# Snapshots of the layers in a run, about: with 48 layers 15 kB each, 1 MB in all.
SNAPSHOTS = 60
SETTINGS = (
    "recipe",
    "learning_rate",
    "latent_learning_rate_factor",
    "lr_scheduler_type",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "hard_fraction",
    "activations_first",
    "progression",
    "distillation_weight",
    "seed",
)
# What reading a file can end with, whatever it holds; and writing one.
FAILURES = (OSError, ValueError, TypeError, OverflowError, RecursionError, MemoryError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gallery:
    """Examples of an evaluation, by their place in its dataset.

    Attributes:
        dataloader: of the evaluation.
        indices: of the chosen examples.
        answers: of each, `label`, `prediction`, `probability` of the prediction, `of_label`, and whether it is `right`.
        total: examples of the evaluation.
        right: how many of them were right.
    """

    dataloader: DataLoader[Any]
    indices: list[int]
    answers: list[dict[str, Any]]
    total: int
    right: int

    def to_dict(self, processor: Any) -> dict[str, Any]:
        """The answers, each with its image as base64 of PNG; JSON types. Nothing where examples hold no images.

        Args:
            processor: knows how pixels were normalized, if it is an image processor.
        """
        examples = Subset(self.dataloader.dataset, self.indices)
        with torch.random.fork_rng():
            batch = self.dataloader.collate_fn(examples.__getitems__(list(range(len(self.indices)))))
        pixels = batch.get("pixel_values")
        if not isinstance(pixels, Tensor) or pixels.ndim != 4:
            return {}
        images = [{"png": png, **answer} for png, answer in zip(_png(pixels, processor), self.answers, strict=True)]
        return {"total": self.total, "right": self.right, "pictures": images}


def choose(dataloader: DataLoader[Any], output: EvalLoopOutput, names: dict[int, str]) -> Gallery | None:
    """Choose the mistakes that the model was surest of, and right answers from all over the data.

    Args:
        dataloader: of the evaluation.
        output: of the evaluation, with logits `[N, C]` and labels `[N]`.
        names: of the classes, as far as they have some.

    Returns:
        None where this was no classification, or no predictions were gathered, or examples cannot be asked for again.
    """
    scores, labels = output.predictions, output.label_ids
    if not isinstance(scores, np.ndarray) or scores.ndim != 2 or not isinstance(labels, np.ndarray) or labels.ndim != 1:
        return None
    if labels.dtype.kind not in "iu" or not len(labels) or not 0 <= labels.min() <= labels.max() < scores.shape[1]:
        return None
    examples = dataloader.dataset
    if isinstance(examples, IterableDataset) or not isinstance(examples, Sized) or len(examples) != len(scores):
        return None
    logits, target = torch.from_numpy(scores).float(), torch.from_numpy(labels).long()
    best, prediction = logits.max(1)
    size = logits.logsumexp(1)
    right = (prediction == target).numpy()
    wrong, others = np.flatnonzero(~right), np.flatnonzero(right)
    surest = wrong[np.argsort((size - best).numpy()[wrong], kind="stable")][:IMAGES]
    spread = others[np.linspace(0, len(others) - 1, min(IMAGES, len(others))).astype(int)]
    indices = [int(index) for index in (*surest, *spread)]

    def answer(index: int) -> dict[str, Any]:
        label, predicted = int(target[index]), int(prediction[index])
        return {
            "label": str(names.get(label, label)),
            "prediction": str(names.get(predicted, predicted)),
            "probability": round(float((logits[index, predicted] - size[index]).exp()), 4),
            "of_label": round(float((logits[index, label] - size[index]).exp()), 4),
            "right": label == predicted,
        }

    return Gallery(dataloader, indices, [answer(index) for index in indices], len(labels), int(right.sum()))


def _png(pixels: Tensor, processor: Any) -> list[str]:
    """Images as base64 of PNG: as they were before normalization, or else from their darkest to their brightest."""
    pixels = pixels.detach().float().cpu()[:, : 3 if pixels.shape[1] >= 3 else 1]
    normalization = processor.to_dict() if isinstance(processor, BaseImageProcessor) else {}
    if normalization.get("do_normalize") and len(normalization["image_mean"]) in (1, pixels.shape[1]):
        mean, std = (torch.tensor(normalization[key]).view(-1, 1, 1) for key in ("image_mean", "image_std"))
        pixels = pixels * std + mean
    else:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp(min=1e-12)
    encoded = []
    for array in (pixels * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy():
        image = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
        image.thumbnail((SIDE, SIDE))
        stream = io.BytesIO()
        image.save(stream, "PNG", optimize=True)
        encoded.append(base64.b64encode(stream.getvalue()).decode())
    return encoded


class RunRecorder:
    """Writes `proxbit_run.jsonl` into the output folder: every log, and the layers at up to 60 logs and at the end.

    Every process counts, for each may hold a part of the weights; the first one writes.

    It begins with the training, and not at all with `logging_strategy="no"`. A training that resumes goes on in the
    same file; one that is damaged is put aside, with a warning. What cannot be written is a warning too: it is the
    report that lacks it, and the training goes on. When it has ended, images of the last evaluation are added; those
    of an evaluation after it take their place.

    Args:
        model: the latent model.

    Attributes:
        writes: whether this process writes the file.
        training: whether a training is under way.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.about = _about(model)  # now, while this process has the full model
        self.active = self.writes = self.training = self.warned = False
        self.snapshots = self.taken = -1
        self.found: Gallery | None = None

    def begin(
        self, args: TrainingArguments, state: TrainerState, settings: Mapping[str, Any], flips: FlipCounter
    ) -> None:
        """Begin the file, or go on in it.

        Args:
            args, state: of the Trainer.
            settings: of the step, beside those of `args`.
            flips: the counter that the logs use.
        """
        self.active, self.flips = args.logging_strategy != IntervalStrategy.NO, flips
        self.writes = self.active and state.is_world_process_zero
        if not self.active:
            return
        self.training, self.found, self.warned = True, None, False
        self.snapshots = self.taken = -1
        if self.writes:
            run = self._run(args, state, settings)
            self.writes = self._attempt(start_file, args.output_dir, run, state.global_step)
        if state.global_step == 0:
            self._add_layers(args, state, counted=False)

    def log(self, args: TrainingArguments, state: TrainerState, logs: Mapping[str, Any]) -> None:
        """Add a log, and a snapshot of the layers if one is due."""
        if not self.active:
            return
        event = {"event": "log", "step": state.global_step, "epoch": state.epoch, **logs}
        if "loss" not in event:
            self._write(args, event)
            return
        hard = all(layer.hardened for _, layer in latent_layers(self.model))
        self._write(args, event | {"hard": hard})
        due = state.global_step * SNAPSHOTS // max(1, state.max_steps)
        if due > self.snapshots:
            self.snapshots = due
            self._add_layers(args, state, counted=True)

    def end_epoch(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Add a snapshot of the end, where no log does; once training has ended, the best model may be in its place."""
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if self.active and ends and not control.should_log and self.taken < state.global_step:
            self.flips.flip_ratio()
            self._add_layers(args, state, counted=True)

    def keep(self, found: Gallery | None) -> None:
        """Keep the images of an evaluation until the training has ended."""
        self.found = found

    def evaluated(self, args: TrainingArguments, state: TrainerState, processor: Any) -> None:
        """Add the images of an evaluation after the training."""
        if not self.training:
            self._add_predictions(args, state, processor)

    def end(self, args: TrainingArguments, state: TrainerState, processor: Any) -> None:
        """Add the images of the last evaluation."""
        self.training = False
        self._add_predictions(args, state, processor)

    def _add_predictions(self, args: TrainingArguments, state: TrainerState, processor: Any) -> None:
        images = self.found.to_dict(processor) if self.writes and self.found is not None else {}
        self.found = None
        if images and self._kept(args):
            when = {"event": "predictions", "step": state.global_step, "epoch": state.epoch}
            self._attempt(replace_event, args.output_dir, when | images)

    def _add_layers(self, args: TrainingArguments, state: TrainerState, counted: bool) -> None:
        counts = {name: latent_histogram(layer).tolist() for name, layer in full_latents(self.model)}
        ratios = self.flips.ratios
        event = {
            "event": "layers",
            "step": state.global_step,
            "epoch": state.epoch,
            "flip_ratio": [round(ratios[name], 7) for name in counts] if counted else None,
            "latents": list(counts.values()),
        }
        self.taken = state.global_step
        self._write(args, event)

    def _write(self, args: TrainingArguments, event: dict[str, Any]) -> None:
        if self.writes and self._kept(args):
            self._attempt(append_event, args.output_dir, event)

    def _attempt(self, write: Callable[..., None], folder: str, *arguments: Any) -> bool:
        """Whether something could be written; the first time that it could not, a warning says so."""
        try:
            write(folder, *arguments)
        except FAILURES as error:
            if not self.warned:
                where, reason = Path(folder) / RUN_LOG, first_line(error)
                logger.warning("%s cannot be written (%s): `proxbit report` will lack it.", where, reason)
            self.warned = True
            return False
        return True

    def _kept(self, args: TrainingArguments) -> bool:
        """Whether the file is still there: once the training has ended, its folder may go."""
        return self.training or (Path(args.output_dir) / RUN_LOG).exists()

    def _run(self, args: TrainingArguments, state: TrainerState, settings: Mapping[str, Any]) -> dict[str, Any]:
        settings = args.to_dict() | dict(settings)
        return self.about | {
            "steps": state.max_steps,
            "epochs": state.num_train_epochs,
            "settings": {name: value for name, value in settings.items() if name in SETTINGS},
            "environment": str(environment()),
        }


def start_file(folder: str, run: dict[str, Any], step: int) -> None:
    """Begin the file of a run, or go on in it; one that is damaged is put aside first."""
    path = Path(folder) / RUN_LOG
    if path.is_dir() or step and path.exists():
        try:
            read_log(folder)
        except FAILURES as error:
            names = (path.with_name(f"{RUN_LOG}.damaged-{number}") for number in count(1))
            aside = next(each for each in names if not each.exists())
            path.rename(aside)
            logger.warning(
                "%s is damaged, and lies in %s now: the report of this run begins at step %d (%s).",
                path,
                aside.name,
                step,
                first_line(error),
            )
    start_log(folder, run, step)


def _about(model: nn.Module) -> dict[str, Any]:
    sizes = summary(model, count_macs=False)
    return {
        "model": sizes.model,
        "layers": [_layer(name, layer) for name, layer in latent_layers(model)],
        "edges": LATENT_EDGES,
        "binary_parameters": sizes.binary_parameters,
        "float_parameters": sizes.float_parameters,
        "latent_bytes": sizes.file_bytes,
        "packed_bytes": sizes.packed_bytes,
    }


def _layer(name: str, layer: LatentWeight) -> dict[str, Any]:
    try:
        pair = pair_key(layer.pair)[0]
    except UnknownNameError:
        pair = "without a name"
    return {"name": name, "kind": type(layer).__name__, "shape": list(layer.weight.shape), "pair": pair}
