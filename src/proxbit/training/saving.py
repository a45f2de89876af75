"""`SavingTrainer`: a Trainer whose checkpoints are complete or not there, whatever breaks."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, TrainOutput

from proxbit.errors import CheckpointError, ProcessLostError
from proxbit.hub.client import first_line
from proxbit.hub.compat import is_lost_process
from proxbit.training.checkpoints import STAGING, check_place, checkpoint_to_resume, commit, recover, rotate
from proxbit.training.finite import FiniteWatch
from proxbit.training.preemption import SaveAtSigterm
from proxbit.training.push import PushingTrainer

__all__ = ["SavingTrainer"]


class SavingTrainer(PushingTrainer):
    """A `PushingTrainer` that loses nothing when something breaks.

    - A checkpoint is written into a staging folder, gets a manifest with the checksum of every file, is forced to disk
      and renamed. `train(resume_from_checkpoint=True)` takes the last complete one.
    - What is no number is not saved: training stops with a LossError in every process.
    - With `args.enable_jit_checkpoint`, SIGTERM ends the process after the step and its checkpoint: `SaveAtSigterm`.
    - An error that stops the training says at which step, and what it can be resumed from.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._staging = False
        self._complete: str | None = None
        self._finite = FiniteWatch(self.accelerator)
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
            CheckpointError: if the checkpoint is not complete, or there is none; if none can be written.
            LossError: at a log or a save, if a loss or a weight is NaN or infinite.
            ProcessLostError: if another process of a distributed training has ended.
        """
        folder = self._complete = self._prepare_folders(resume_from_checkpoint)
        self._finite = FiniteWatch(self.accelerator)
        try:
            with self._sigterm.listening() if self.args.enable_jit_checkpoint else nullcontext():
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

    def _prepare_folders(self, wanted: str | bool | None) -> str | None:
        """Clear the output folder of what a killed run left; return what to resume from, the same in every process."""
        found: list[str | CheckpointError | None] = [None]
        output_dir = Path(self.args.output_dir)
        try:
            if self.args.should_save:
                recover(output_dir)
                if self.args.save_strategy != IntervalStrategy.NO:
                    check_place(output_dir)
            if self.is_world_process_zero():
                found = [checkpoint_to_resume(output_dir, wanted)]
        except CheckpointError as error:
            found = [error]
        except OSError as error:
            found = [CheckpointError(f"{output_dir} cannot be used: {error}.")]
        broadcast_object_list(found)
        if isinstance(found[0], CheckpointError):
            raise found[0]
        return found[0]

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
        return str(Path(folder) / STAGING) if self._staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save into the staging folder; once all processes have, the first one makes it a checkpoint."""
        self._finite.check(self.state.global_step, self.model)
        output_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = output_dir / name
        try:
            if self.args.should_save:
                shutil.rmtree(output_dir / STAGING, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._staging = True
            super()._save_checkpoint(model, trial)
            self._staging = False
            self._name_best(output_dir)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(output_dir / STAGING / name / TRAINER_STATE_NAME))
                commit(output_dir, name)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            if is_lost_process(error):
                raise
            free = shutil.disk_usage(output_dir).free
            if self.args.should_save:
                shutil.rmtree(output_dir / STAGING, ignore_errors=True)
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

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """With `args.push_to_hub`, once the checkpoint is complete."""
        if not self._staging:
            super()._push_from_checkpoint(checkpoint_folder)
