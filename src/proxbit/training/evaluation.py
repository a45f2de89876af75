"""Accuracy and speed of an image classifier on images, through the pipeline that its users run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import evaluate
import torch
from evaluate.evaluator.image_classification import ImageClassificationEvaluator
from transformers import ImageClassificationPipeline, PreTrainedModel

from proxbit.analysis.timing import time_rounds
from proxbit.analysis.variants import forward_calls
from proxbit.training.image_folders import IMAGE, LABEL, Images, LeftOut, relabel
from proxbit.training.labels import match_labels, numbers_of_labels
from proxbit.training.metrics import Accuracy, BalancedAccuracy

__all__ = ["Evaluation", "evaluate_images"]

Watch = Callable[[Iterable[Any], int], Iterable[Any]]
LATENCY_ROUNDS = 11


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        pictures: how many were classified.
        accuracy, balanced_accuracy: in [0, 1].
        latency_ms: of the model alone for one image, the median of 11.
        pictures_per_second: through the pipeline: reading, resizing, model.
        left_out: images that could not be read.
    """

    pictures: int
    accuracy: float
    balanced_accuracy: float
    latency_ms: float
    pictures_per_second: float
    left_out: tuple[LeftOut, ...]


class _Classifier:
    """A pipeline as the evaluator calls it; it answers with numbers, for names of labels need not be unique."""

    task = "image-classification"

    def __init__(self, pipeline: ImageClassificationPipeline, watch: Watch) -> None:
        self.pipeline, self.watch = pipeline, watch

    def __call__(self, images: Any) -> list[list[dict[str, Any]]]:
        answers = self.pipeline((image for image in images), top_k=1)
        return list(self.watch(answers, len(images)))


class _Evaluator(ImageClassificationEvaluator):
    """`evaluate.evaluator("image-classification")`, which takes a pipeline that is made already.

    That of evaluate 0.4.6 compares it with a class for TensorFlow, which transformers 5 no longer has.
    """

    def prepare_pipeline(self, model_or_pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        return model_or_pipeline


def evaluate_images(
    model: PreTrainedModel,
    processor: Any,
    images: Images,
    *,
    name: str,
    batch: int = 1,
    watch: Watch = lambda items, total: items,
) -> Evaluation:
    """Classify images, and compare with their labels.

    Args:
        model: an image classifier in any state; its names of labels are replaced by numbers.
        processor: its image processor.
        images: whose classes are among the model's labels.
        name: of the model, for messages.
        batch: images in a forward pass of the pipeline.
        watch: is handed the answers and their number, and hands them on: a progress bar.

    Raises:
        DataError: if a class is none of the model's labels.
    """
    numbers = match_labels(images.names, numbers_of_labels(model.config), name)
    data = relabel(images, numbers, name)
    model.config.id2label = {i: str(i) for i in range(model.config.num_labels)}
    pipeline = ImageClassificationPipeline(model=model, image_processor=processor, batch_size=batch)
    with torch.inference_mode():
        result = _Evaluator("image-classification").compute(
            model_or_pipeline=_Classifier(pipeline, watch),
            data=data,
            metric=evaluate.combine([Accuracy(), BalancedAccuracy()]),
            input_column=IMAGE,
            label_column=LABEL,
            label_mapping={str(i): i for i in range(model.config.num_labels)},
        )
    timings = time_rounds(forward_calls({"model": model}, batch=1), LATENCY_ROUNDS)
    return Evaluation(
        pictures=len(data),
        accuracy=result["accuracy"],
        balanced_accuracy=result["balanced_accuracy"],
        latency_ms=1e3 * timings.median("model"),
        pictures_per_second=result["samples_per_second"],
        left_out=images.left_out,
    )
