"""`FirstLookTrainer`: a Trainer of latent models that looks at the first examples before its first step."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import has_length

from proxbit.errors import ConfigError, ProxbitError
from proxbit.nn import learned_modules
from proxbit.training.calibration import calibrate
from proxbit.training.callbacks import LayerScores
from proxbit.training.lookahead import Lookahead
from proxbit.training.saving import SavingTrainer
from proxbit.training.stages import PROGRESSIONS

__all__ = ["BATCHES", "FirstLookTrainer"]

# Batches that are looked at before the first step.
BATCHES = 4


class FirstLookTrainer(SavingTrainer):
    """A `SavingTrainer` that starts quantizers, and orders layers, by the first training examples.

    It trains on these too: a stream, which may be read only once, gets them back.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lookahead: Lookahead | None = None
        self._calibration_samples: int | None = None
        if PROGRESSIONS.get(self.args.progression).score is not None:
            self.add_callback(LayerScores())

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As the Trainer's; what is looked at before the first step is given back to a stream."""
        whole: Any = self.train_dataset  # type: ignore[has-type]
        self._lookahead = Lookahead(whole) if isinstance(whole, IterableDataset) else None
        self.train_dataset = whole if self._lookahead is None else self._lookahead
        try:
            return super().get_train_dataloader()  # type: ignore[no-any-return]
        finally:
            self.train_dataset = whole

    @property
    def _kept(self) -> LayerScores | None:
        """Where scores are, if the progression goes by some; restoring callbacks from a checkpoint makes it anew."""
        return next((each for each in self.callback_handler.callbacks if isinstance(each, LayerScores)), None)

    def _score(self) -> None:
        """Take what the progression goes by, before the first step; from then on checkpoints keep it."""
        score, kept = PROGRESSIONS.get(self.args.progression).score, self._kept
        if score is None or kept is None:
            return
        self.model.to(self.args.device)
        with torch.random.fork_rng():
            found = score(self.model, self._training_loss, islice(self._first_batches(), BATCHES))
        # The same in every process, to the last bit: a GPU may sum in any order.
        values = broadcast(torch.tensor(list(found.values()), device=self.args.device))
        kept.scores = dict(zip(found, values.tolist(), strict=True))

    def _training_loss(self, batch: Any) -> Tensor:
        try:
            with self.accelerator.autocast():
                return self.compute_loss(self.model, self._prepare_inputs(batch))  # type: ignore[return-value]
        except ProxbitError:
            raise
        except ValueError as error:
            raise ConfigError(
                f"progression={self.args.progression!r} takes gradients of the training loss, of which there is none: "
                f"{error}"
            ) from error

    def _calibrate(self) -> None:
        """Start what nobody has calibrated yet from the first examples, which are the same in every process."""
        if self.train_dataset is None or all(module.calibrated for _, module in learned_modules(self.model)):
            return
        self.model.to(self.args.device)
        with torch.random.fork_rng(), self.accelerator.autocast():
            seen = BATCHES * self.args.per_device_train_batch_size
            batches = list(islice(self._first_batches(), BATCHES))
            calibrate(self.model, batches, weights=False, num_images=seen)
        self._calibration_samples = min(len(self.train_dataset), seen) if has_length(self.train_dataset) else seen

    def _first_batches(self) -> Iterable[Any]:
        """The first training examples as the first process draws them, so that they are the same in all."""
        dataset: Any = self.train_dataset
        collator = self.data_collator
        if dataset is None:
            return
        if self._lookahead is not None:
            dataset = self._lookahead.look()
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        for batch in DataLoader(dataset, self.args.per_device_train_batch_size, collate_fn=collator):
            yield broadcast_object_list([batch])[0]
