"""`SavingTrainer`: a Trainer whose checkpoints are complete or not there, whatever breaks."""

import logging
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, TrainOutput

from proxbit.checkpoint.staging import locked
from proxbit.errors import CheckpointError, ProcessLostError
from proxbit.foreign import first_line
from proxbit.plugin.compat import is_lost_process
from proxbit.training.checkpoints import (
    check_place,
    checkpoint_to_resume,
    clear,
    commit,
    new_staging,
    recover,
    rotate,
)
from proxbit.training.distillation import DistillationTrainer
from proxbit.training.monitor import FiniteWatch

__all__ = ["LOCK", "SaveAtSigterm", "SavingTrainer"]

# In the output folder while a training writes there. The Trainer's uploads leave out names that begin so.
LOCK = "_proxbit_lock"
# What a shell reports of a process that SIGTERM has ended.
STATUS = 128 + signal.SIGTERM

logger = logging.getLogger(__name__)


class SavingTrainer(DistillationTrainer):
    """A `DistillationTrainer` that loses nothing when something breaks.

    - A checkpoint is written into a staging folder, gets a manifest with the checksum of every file, is forced to disk
      and renamed. `train(resume_from_checkpoint=True)` takes the last complete one.
    - One training at a time writes into an output folder: another one is refused.
    - What is no number is not saved: training stops with a LossError in every process.
    - With `args.enable_jit_checkpoint`, SIGTERM ends the process after the step and its checkpoint: `SaveAtSigterm`.
    - An error that stops the training says at which step, and what it can be resumed from.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._staging = False
        self._staging_name = new_staging()  # on which the processes agree as they begin to train
        self._complete: str | None = None
        self._finite = FiniteWatch()
        self._sigterm = SaveAtSigterm(self.accelerator)
        if self.args.enable_jit_checkpoint:
            # The one of transformers saves in the middle of a step, into the place of the checkpoint.
            stock = self.pop_callback(JITCheckpointCallback)
            stock.on_train_end(self.args, self.state, self.control)  # SIGTERM is as it was before
            self.add_callback(self._sigterm)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, or go on.

        Args:
            resume_from_checkpoint: True for the last complete checkpoint of the output folder, or a folder.
            trial, ignore_keys_for_eval: as in `transformers.Trainer`.

        Raises:
            CheckpointError: if the checkpoint is not complete, or there is none; if none can be written; if another
                training writes into the output folder.
            LossError: at a log or a save, if a loss or a weight is NaN or infinite.
            ProcessLostError: if another process of a distributed training has ended.
        """
        with ExitStack() as stack:
            folder = self._complete = self._prepare_folders(resume_from_checkpoint, stack)
            self._finite.reset()
            if self.args.enable_jit_checkpoint:
                stack.enter_context(self._sigterm.listening())
            return self._train(folder, trial, ignore_keys_for_eval)

    def _train(self, folder: str | None, trial: Any, ignore_keys_for_eval: list[str] | None) -> TrainOutput:
        """As the Trainer's `train`; an error says where training stands."""
        try:
            return super().train(folder, trial, ignore_keys_for_eval)
        except UnpicklingError as error:
            raise CheckpointError(
                f"{folder} holds a file with more than tensors and numbers; nothing in it was run: {first_line(error)}"
            ) from error
        except Exception as error:
            if is_lost_process(error):
                lost = ProcessLostError(
                    "Another process of this training has ended, or cannot be reached; see what it said last."
                )
                lost.add_note(self._where())
                raise lost from error
            if self.state.global_step:
                error.add_note(self._where())
            raise

    def _prepare_folders(self, wanted: str | bool | None, stack: ExitStack) -> str | None:
        """Lock the output folder and clear it of what a killed run left; return what to resume from, the same in every
        process.
        """
        output_dir = Path(self.args.output_dir)
        resume: str | None = None
        error: CheckpointError | None = None
        try:
            if self.args.should_save:
                recover(output_dir, alone=stack.enter_context(locked(output_dir / LOCK, output_dir)))
                if self.args.save_strategy != IntervalStrategy.NO:
                    check_place(output_dir)
            if self.is_world_process_zero():
                resume = checkpoint_to_resume(output_dir, wanted)
        except CheckpointError as refusal:
            error = refusal
        except OSError as refusal:
            error = CheckpointError(f"{output_dir} cannot be used: {refusal}.")
        # With `save_on_each_node` several processes have a folder to lock.
        found: list[tuple[str | None, CheckpointError | None, str]]
        found = gather_object([(resume, error, self._staging_name)])
        for _, each, _ in found:
            if each is not None:
                raise each
        resume, _, self._staging_name = found[0]
        return resume

    def _where(self) -> str:
        """Where training stands, and how it goes on."""
        rank = f"Rank {self.args.process_index}" if self.args.world_size > 1 else "Training"
        again = "No checkpoint has been saved yet."
        if self._complete is not None:
            again = f"The last complete checkpoint is {self._complete}: resume_from_checkpoint=True goes on from there."
        return f"{rank} stopped at step {self.state.global_step} of {self.state.max_steps}. {again}"

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's; remembers a loss that is no number."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._finite.see(loss, self.state.global_step + 1)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; stops at a loss that was no number."""
        if self.is_in_train and ("loss" in logs or "train_loss" in logs):
            self._finite.check(self.state.global_step)
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; then ends the process, if SIGTERM asked for what was saved."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._sigterm.leave_once_saved(self.state)

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return str(Path(folder) / self._staging_name) if self._staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save into the staging folder; once all processes have, the first one makes it a checkpoint."""
        self._finite.check(self.state.global_step, self.model)
        output_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder, staging = output_dir / name, output_dir / self._staging_name
        try:
            if self.args.should_save:
                clear(staging)
            self.accelerator.wait_for_everyone()
            self._staging = True
            super()._save_checkpoint(model, trial)
            self._staging = False
            self._name_best(output_dir)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
                commit(staging, output_dir, name)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            if is_lost_process(error):
                raise
            free = shutil.disk_usage(output_dir).free
            if self.args.should_save:
                clear(staging)
            raise CheckpointError(
                f"{folder} could not be written: {first_line(error)} ({free:,} bytes were free). Earlier checkpoints "
                "are untouched."
            ) from error
        finally:
            self._staging = False
        self._complete = str(folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate(output_dir, self.args.save_total_limit, {str(folder), self.state.best_model_checkpoint})

    def _name_best(self, output_dir: Path) -> None:
        """The best checkpoint by its name in the output folder: the Trainer has looked for it in the staging folder."""
        step = self.state.best_global_step
        best = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if step and (step == self.state.global_step or best.exists()):
            self.state.best_model_checkpoint = str(best)


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
