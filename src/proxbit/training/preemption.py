"""SIGTERM with time to save: what a machine that is about to be taken away sends."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["SaveAtSigterm"]

# What a shell reports of a process that SIGTERM has ended.
STATUS = 128 + signal.SIGTERM

logger = logging.getLogger(__name__)


class SaveAtSigterm(TrainerCallback):
    """At SIGTERM: finishes the optimizer step, has a checkpoint saved, and ends the process with status 143.

    With several processes they agree at every step, so that all save the same one; it is enough that one of them gets
    the signal.

    Args:
        accelerator: of the Trainer.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.asked = self.leaving = self.saved = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM in this block. One that no step has answered is sent again at its end."""
        self.asked = self.leaving = self.saved = False
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
        if self.asked:
            signal.raise_signal(signal.SIGTERM)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have this step saved if any process has been asked to end."""
        if not self.leaving and self._any_asked():
            self.leaving = True
        if self.leaving:
            control.should_save = True

    def _any_asked(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.asked
        if self.asked:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember that the step is saved: other callbacks may have to hear of it yet."""
        self.saved = self.leaving

    def leave_once_saved(self, state: TrainerState) -> None:
        """End the process if it was asked to, and every callback has heard of the checkpoint."""
        if not self.saved:
            return
        if state.is_local_process_zero:
            logger.warning(
                "SIGTERM: saved checkpoint-%d, and stopped at step %d of %d. "
                "train(resume_from_checkpoint=True) goes on from there.",
                state.global_step,
                state.global_step,
                state.max_steps,
            )
        raise SystemExit(STATUS)
