"""The images of an evaluation that a report shows: some that were right, and the surest mistakes."""

import base64
import io
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import EvalLoopOutput

__all__ = ["Gallery", "choose"]

# Images of each kind, and the longest side that is kept, in pixels: about 500 kB at most.
IMAGES = 12
SIDE = 96


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
