"""What a model is shown: images in whatever form they come, as keyword arguments of its forward pass."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, BatchFeature, default_data_collator

from proxbit.errors import ConfigError, DataError
from proxbit.plugin.loading import load_pretrained
from proxbit.training.pixels import as_rgb

__all__ = ["CHUNK", "batches_of", "chunks_of", "length", "main_input"]

# Images that are computed together: always so many, so that results do not depend on whoever made batches.
CHUNK = 16
PIXELS = "pixel_values"
# What a forward pass takes for its loss only.
LABELS = ("labels", "label", "label_ids", "mask_labels", "class_labels")
VALID = (
    "a dataset, a DataLoader, a list of PIL images or of tensors [C, H, W], or batches, such as {'pixel_values': ...}"
)


def main_input(model: nn.Module) -> str:
    """The name of the argument that takes images."""
    named = getattr(model, "main_input_name", None)
    if isinstance(named, str):
        return named
    parameters = inspect.signature(model.forward).parameters.values()
    first = next(iter(parameters), None)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return first.name if first is not None and first.kind in by_name else PIXELS


class _Reader:
    """Turns examples and batches into keyword arguments."""

    def __init__(self, model: nn.Module, processor: Any | None) -> None:
        self.model, self.given, self.key = model, processor, main_input(model)
        self._processor: Any | None = processor

    @property
    def processor(self) -> Any:
        if self._processor is None:
            name = getattr(getattr(self.model, "config", None), "name_or_path", "")
            try:
                self._processor = load_pretrained(AutoImageProcessor, name)
            except (OSError, ValueError, TypeError) as error:
                raise ConfigError(
                    "calibrate: images need to be prepared as the model takes them, and there is no image processor "
                    f"beside it ({name or 'the model has no name'}): calibrate(model, images, processor=...)."
                ) from error
        return self._processor

    def is_example(self, item: Any) -> bool:
        """Whether an item is one image, and not a batch of them."""
        if isinstance(item, Image.Image):
            return True
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Image.Image | Tensor):
            return self.is_example(item[0])
        if isinstance(item, Tensor):
            return self.key == PIXELS and item.ndim == 3
        if isinstance(item, Mapping):
            pixels = item.get(PIXELS)
            one = isinstance(pixels, list) or (getattr(pixels, "ndim", 0) == 3 and not _agree(item))
            return one or self._image(item) is not None
        return False

    @staticmethod
    def _image(example: Mapping[str, Any]) -> Image.Image | None:
        return next((value for value in example.values() if isinstance(value, Image.Image)), None)

    def batch(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Examples, together."""
        examples = [each[0] if isinstance(each, tuple) else each for each in examples]
        images = [self._image(each) if isinstance(each, Mapping) else each for each in examples]
        if all(isinstance(each, Image.Image) for each in images):
            return dict(self.processor(images=[_shown(each) for each in images], return_tensors="pt"))
        if all(isinstance(each, Tensor) for each in examples):
            return {self.key: torch.stack(examples)}
        without = [{key: value for key, value in each.items() if key not in LABELS} for each in examples]
        return dict(default_data_collator(without))

    def check(self, batch: Any) -> dict[str, Any]:
        """A batch, by name and without labels.

        Raises:
            ConfigError: if it is none.
        """
        if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
            batch = batch[0]  # images and labels
        if isinstance(batch, Tensor):
            batch = {self.key: batch}
        if not isinstance(batch, Mapping | BatchFeature):
            raise ConfigError(f"calibrate takes {VALID}; not a {type(batch).__name__}.")
        kept = {str(key): value for key, value in batch.items() if key not in LABELS}
        lengths = [len(value) for value in kept.values() if isinstance(value, Tensor) and value.ndim]
        if not lengths or 0 in lengths:
            found = {key: getattr(value, "shape", type(value).__name__) for key, value in kept.items()}
            raise ConfigError(f"calibrate: a batch holds tensors with at least one example, not {found}.")
        return kept


def _shown(image: Any) -> Image.Image:
    try:
        return as_rgb(image)
    except DataError as error:
        raise DataError(f"calibrate: an image of mode {image.mode} cannot be taken: {error}.") from error


def _agree(batch: Mapping[str, Any]) -> bool:
    """Whether there are several tensors, with as many examples each."""
    lengths = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim]
    return len(lengths) > 1 and len(set(lengths)) == 1


def _drawn(data: Any, count: int, seed: int) -> Iterator[Any]:
    """Some items of what has a length, in random order."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count]
    return (data[int(i)] for i in order)


def batches_of(
    model: nn.Module, data: Any, *, images: int | None, processor: Any | None = None, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Batches of keyword arguments.

    Args:
        model: that takes them.
        data: see `VALID`. Of single images with a length some are drawn at random; all else is taken in its order.
        images: at most so many; None for all.
        processor: of images; None for the one beside the model.
        seed: of the draw.

    Raises:
        ConfigError: for anything else.
    """
    reader = _Reader(model, processor)
    if isinstance(data, Mapping):
        yield _first(reader.check(data), images)
        return
    if isinstance(data, Tensor):
        data = [data]
    if isinstance(data, str | bytes | nn.Module) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise ConfigError(f"calibrate takes {VALID}; not {data!r}.")
    counts = hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, DataLoader)
    examples = counts and not isinstance(data, list | tuple)  # A map-style dataset holds nothing else.
    if examples or (counts and len(data) and reader.is_example(data[0])):
        data = _drawn(data, len(data) if images is None else images, seed)
    left = images
    items = iter(data)
    for item in items:
        if examples or reader.is_example(item):
            size = CHUNK if left is None else min(CHUNK, left)
            batch = reader.check(reader.batch([item, *islice(items, size - 1)]))
        else:
            batch = _first(reader.check(item), left)
        yield batch
        if left is not None:
            left -= length(batch)
            if left <= 0:
                return


def length(batch: Mapping[str, Any]) -> int:
    """How many examples there are in a batch."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)


def _splits(batch: Mapping[str, Any]) -> bool:
    """Whether every tensor of a batch has one part an example."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    return all(each.ndim and len(each) == len(tensors[0]) for each in tensors)


def _first(batch: dict[str, Any], count: int | None) -> dict[str, Any]:
    if count is None or not _splits(batch):
        return batch
    return {key: value[:count] if isinstance(value, Tensor) else value for key, value in batch.items()}


def chunks_of(batches: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Batches, put together and taken apart into chunks of one size, as far as their shapes allow."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for k, batch in enumerate(batches):
        shapes = [(key, v.shape[1:], v.dtype) if isinstance(v, Tensor) else (key, repr(v)) for key, v in batch.items()]
        groups.setdefault(tuple(shapes) if _splits(batch) else k, []).append(dict(batch))
    chunks = []
    for group in groups.values():
        if not _splits(group[0]):
            chunks += group
            continue
        whole = {key: torch.cat([each[key] for each in group]) for key, v in group[0].items() if isinstance(v, Tensor)}
        parts = {key: value.split(CHUNK) for key, value in whole.items()}
        for k in range(len(next(iter(parts.values())))):
            chunks.append({key: parts[key][k] if key in parts else value for key, value in group[0].items()})
    return chunks
