"""The first training examples, looked at before the first step: a stream, which may be read once, gets them back."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from proxbit.errors import ConfigError, ProxbitError
from proxbit.training.calibration import calibrate
from proxbit.training.quantizer_start import needs_examples

__all__ = [
    "BATCHES",
    "Lookahead",
    "first_batches",
    "first_batches_of",
    "is_used_up",
    "layer_scores",
    "start_quantizers_from",
]

# Batches that are looked at.
BATCHES = 4


def first_batches(dataset: Any, batch_size: int, collate: Any) -> Iterator[Any]:
    """The first batches as the first process draws them, so that they are the same in all."""
    for batch in islice(DataLoader(dataset, batch_size, collate_fn=collate), BATCHES):
        yield broadcast_object_list([batch])[0]


def first_batches_of(trainer: Any, lookahead: "Lookahead | None") -> Iterator[Any]:
    """Those of a Trainer, with the columns that its model takes; of a stream through a `Lookahead`."""
    dataset, collator = trainer.train_dataset, trainer.data_collator
    if dataset is None:
        return iter(())
    if lookahead is not None:
        dataset = lookahead.look()
    if isinstance(dataset, datasets.Dataset):
        dataset = trainer._remove_unused_columns(dataset, description="training")
    else:
        collator = trainer._get_collator_with_removed_columns(collator, description="training")
    return first_batches(dataset, trainer.args.per_device_train_batch_size, collator)


def layer_scores(trainer: Any, score: Callable[..., dict[str, float]], batches: Iterable[Any]) -> dict[str, float]:
    """What a `Progression` measures, with the loss of a Trainer; the same in every process, to the last bit."""
    model, device = trainer.model, trainer.args.device
    model.to(device)

    def loss(batch: Any) -> Tensor:
        try:
            with trainer.accelerator.autocast():
                return trainer.compute_loss(model, trainer._prepare_inputs(batch))  # type: ignore[no-any-return]
        except ProxbitError:
            raise
        except ValueError as error:
            raise ConfigError(
                f"progression={trainer.args.progression!r} takes gradients of the training loss, of which there is "
                f"none: {error}"
            ) from error

    with torch.random.fork_rng():
        found = score(model, loss, batches)
    values = broadcast(torch.tensor(list(found.values()), device=device))  # A GPU may sum in any order.
    return dict(zip(found, values.tolist(), strict=True))


def start_quantizers_from(model: nn.Module, dataloader: Any, batch_size: int) -> None:
    """Start quantizers of activations that have not been calibrated from the first training examples."""
    if not needs_examples(model):
        return
    dataset = getattr(dataloader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset):
        raise ConfigError(
            "The quantizers of activations start from examples, and this training reads a stream, which cannot be "
            "looked at before: call proxbit.calibrate(model, images, weights=False) first."
        )
    with torch.random.fork_rng():
        batches = list(first_batches(dataset, batch_size, dataloader.collate_fn))
        calibrate(model, batches, weights=False, num_images=BATCHES * batch_size)


class Lookahead(IterableDataset[Any]):
    """A stream that gives back what was looked at: the next reading begins with it, and goes on where the look stopped.

    Args:
        stream: of examples. What it has beside them is asked of it: `set_epoch`, the number of its shards.
    """

    def __init__(self, stream: IterableDataset[Any]) -> None:
        self.stream = stream
        self.taken: list[Any] = []
        self.rest: Iterator[Any] | None = None

    def look(self) -> IterableDataset[Any]:
        """The examples for a look, which may stop anywhere; each look begins with the first."""
        return _Look(self)

    def __iter__(self) -> Iterator[Any]:
        taken, rest = self.taken, self.rest
        self.taken, self.rest = [], None
        return iter(self.stream) if rest is None else chain(taken, rest)

    def __len__(self) -> int:
        return len(self.stream)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # while a copy is made
            raise AttributeError(name)
        return getattr(self.stream, name)


class _Look(IterableDataset[Any]):
    def __init__(self, whole: Lookahead) -> None:
        self.whole = whole

    def __iter__(self) -> Iterator[Any]:
        whole = self.whole
        yield from list(whole.taken)
        if whole.rest is None:
            whole.rest = iter(whole.stream)
        for example in whole.rest:
            whole.taken.append(example)
            yield example


def is_used_up(dataset: IterableDataset[Any]) -> bool:
    """Whether a stream that has just been read to its end in this process gives nothing any more."""
    return next(iter(dataset), None) is None
