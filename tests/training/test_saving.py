"""The checkpoints of the Trainer: complete, in the right number, and never unpickled."""

import errno
import fcntl
import logging
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, ViTForImageClassification
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

import proxbit
from proxbit.checkpoint.staging import locked
from proxbit.errors import CheckpointError, LossError
from proxbit.training import ProxConnectArguments, ProxConnectTrainer
from proxbit.training.checkpoints import MANIFEST, STAGING, check_checkpoint
from proxbit.training.saving import LOCK
from tiny_models import LABELS, SIDE, vit

FULL = {"config.json", "model.safetensors", "training_args.bin", "trainer_state.json", MANIFEST}
STATES = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


@pytest.fixture
def make(tmp_path, crops):
    """A function that makes a trainer of a tiny model: six steps, a checkpoint every two."""

    def make_trainer(callbacks=(), **changes):
        torch.manual_seed(0)
        fixed = dict(report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="steps", save_steps=2)
        training = dict(max_steps=6, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-2)
        data = [{"pixel_values": image, "labels": i % LABELS} for i, image in enumerate(crops(4, SIDE))]
        return ProxConnectTrainer(
            model=proxbit.binarize(ViTForImageClassification(vit())),
            args=ProxConnectArguments(str(tmp_path / "out"), **fixed | training | changes),
            train_dataset=data,
            eval_dataset=data,
            callbacks=[*callbacks],
        )

    return make_trainer


def names(folder):
    return {path.name for path in folder.iterdir()}


class Saves(TrainerCallback):
    """What is in the output folder at every save, and which checkpoints are complete."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_save(self, args, state, control, **kwargs):
        found = names(self.folder) - {"proxbit_run.jsonl", LOCK}
        for name in found:
            check_checkpoint(self.folder / name)
        self.seen.append(sorted(found))


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3]), (2, [1, 2, 2]), (1, [1, 1, 1])])
def test_every_checkpoint_is_complete_and_old_ones_go(tmp_path, make, limit, kept):
    saves = Saves(tmp_path / "out")
    make([saves], save_total_limit=limit).train()
    steps = [2, 4, 6]
    assert saves.seen == [[f"checkpoint-{n}" for n in steps[: i + 1][-kept[i] :]] for i in range(3)]
    assert names(tmp_path / "out" / "checkpoint-6") == FULL | STATES


def test_only_the_model(tmp_path, make):
    make(save_only_model=True, max_steps=2).train()
    check_checkpoint(tmp_path / "out" / "checkpoint-2")
    assert names(tmp_path / "out" / "checkpoint-2") == FULL


def test_the_best_checkpoint_stays_and_has_its_own_name(tmp_path, make):
    """The best is the first: it outlives the limit, and later checkpoints know it by its place."""
    scores = iter([0.9, 0.0, 0.1, 0.0, 0.2, 0.0])
    evaluation = dict(eval_strategy="steps", eval_steps=2, metric_for_best_model="score", load_best_model_at_end=True)
    trainer = make(save_total_limit=2, **evaluation)
    trainer.compute_metrics = lambda prediction: {"score": next(scores)}
    trainer.train()
    best = tmp_path / "out" / "checkpoint-2"
    assert names(tmp_path / "out") >= {"checkpoint-2", "checkpoint-6"} and STAGING not in names(tmp_path / "out")
    for step in (2, 6):
        assert str(best) in (tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text()
    assert STAGING not in (tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text()
    assert trainer.state.best_model_checkpoint == str(best)


def test_what_is_pushed_is_complete(tmp_path, make, monkeypatch):
    pushed = []
    trainer = make(max_steps=4)

    def upload(trainer):
        check_checkpoint(Path(trainer._complete))
        pushed.append(trainer._complete)

    monkeypatch.setattr("proxbit.training.trainer.upload_at_save", upload)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [str(tmp_path / "out" / f"checkpoint-{step}") for step in (2, 4)]


def test_no_token_is_saved(tmp_path, make):
    """Arguments are pickled beside every checkpoint and model; those of the Trainer itself keep the token."""
    trainer = make(max_steps=2, hub_token="hf_secret")
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.name == "training_args.bin" for path in files) == 2
    assert not any(b"hf_secret" in path.read_bytes() for path in files)
    assert trainer.args.hub_token == "hf_secret"
    kept = torch.load(tmp_path / "model" / "training_args.bin", weights_only=False)
    assert kept.hub_token is None and kept.max_steps == 2


def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path, make, caplog):
    """The learning rate would begin anew."""
    make(max_steps=4, save_only_model=True).train()
    folder = tmp_path / "out" / "checkpoint-4"
    with pytest.raises(CheckpointError, match=r"no complete checkpoint .*checkpoint-4 \(it holds no optimizer"):
        make(save_only_model=True).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="from_pretrained and leave resume_from_checkpoint out"):
        make().train(resume_from_checkpoint=str(folder))


class Trap:
    """What runs code when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize(("name", "how"), [(name, ("torch", "pickle")[i % 2]) for i, name in enumerate(sorted(STATES))])
def test_nothing_is_unpickled(tmp_path, make, name, how):
    """Whoever can change a file can change the manifest as well: without one, the file is read. The control: unpickled,
    the file does run its code.
    """
    make(max_steps=2).train()
    folder, mark = tmp_path / "out" / "checkpoint-2", tmp_path / "mark"
    (folder / MANIFEST).unlink()
    file = folder / name
    if how == "torch":
        torch.save({"state": Trap(mark)}, file)
    else:
        file.write_bytes(pickle.dumps({"state": Trap(mark)}))
    trainer = make()
    with pytest.raises(CheckpointError, match="holds a file with more than tensors and numbers; nothing in it was run"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert not mark.exists()
    torch.load(file, weights_only=False) if how == "torch" else pickle.loads(file.read_bytes())
    assert mark.exists()


def test_an_error_says_where_training_stands(tmp_path, make):
    class Breaks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == self.at:
                raise KeyError("broken")

    breaks = Breaks()
    for at, again in (
        (1, "No checkpoint has been saved yet."),
        (
            3,
            f"The last complete checkpoint is {tmp_path / 'out' / 'checkpoint-2'}: resume_from_checkpoint=True goes on",
        ),
    ):
        breaks.at = at
        with pytest.raises(KeyError) as error:
            make([breaks]).train()
        (note,) = error.value.__notes__
        assert note.startswith(f"Training stopped at step {at} of 6. {again}")


@pytest.mark.parametrize("logging", ["steps", "no"])
def test_what_is_no_number_is_not_saved(tmp_path, make, logging):
    """At a log the loss is found; without logs, at the next save; without either, at the end."""
    trainer = make(logging_strategy=logging)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: compute(*a, **k) * (float("nan") if trainer.state.global_step == 2 else 1)
    with pytest.raises(LossError, match="loss of rank 0 was NaN or infinite at step 3"):
        trainer.train()
    assert trainer.state.global_step == (3 if logging == "steps" else 4)
    assert names(tmp_path / "out") - {"proxbit_run.jsonl"} == {"checkpoint-2"}
    check_checkpoint(tmp_path / "out" / "checkpoint-2")

    unsaved = make(logging_strategy="no", save_strategy="no", max_steps=3)
    unsaved.compute_loss = lambda *a, **k: compute(*a, **k) * float("nan")
    with pytest.raises(LossError, match="at step 1"):
        unsaved.train()


def test_a_weight_that_is_no_number_is_not_saved(tmp_path, make):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                nn.init.constant_(model.classifier.bias, float("inf"))

    with pytest.raises(LossError, match="classifier.bias holds NaN or infinite values after step 4"):
        make([Break()]).train()
    assert names(tmp_path / "out") - {"proxbit_run.jsonl"} == {"checkpoint-2"}


def test_at_sigterm_every_callback_hears_of_the_checkpoint(make, tmp_path):
    """One that is added to the trainer comes after the one that ends the process."""

    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    trainer, saves = make([Terminate()], enable_jit_checkpoint=True), Saves(tmp_path / "out")
    trainer.add_callback(saves)
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 143
    assert saves.seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]


def test_sigterm_is_taken_during_training_only(make):
    """The callback of transformers would save in the middle of a step, and takes the signal from the start."""
    taken = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            taken.append(signal.getsignal(signal.SIGTERM))

    trainer = make([Look()], max_steps=1, save_strategy="no", enable_jit_checkpoint=True)
    assert not any(isinstance(each, JITCheckpointCallback) for each in trainer.callback_handler.callbacks)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    trainer.train()
    assert taken == [trainer._sigterm._ask] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_full_disk_leaves_what_was_there(tmp_path, make):
    """The file of the optimizer is on a device that is full."""
    trainer = make()
    save = trainer._save_optimizer_and_scheduler

    def full(folder):
        if trainer.state.global_step == 4:
            Path(folder, "optimizer.pt").symlink_to("/dev/full")
        save(folder)

    trainer._save_optimizer_and_scheduler = full
    with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written: .* bytes were free.* untouched"):
        trainer.train()
    assert names(tmp_path / "out") == {"checkpoint-2", "proxbit_run.jsonl"}
    check_checkpoint(tmp_path / "out" / "checkpoint-2")


def test_the_next_training_clears_what_a_killed_one_left(tmp_path, make, caplog):
    make(max_steps=2).train()
    (tmp_path / "out" / STAGING / "checkpoint-4").mkdir(parents=True)
    with caplog.at_level(logging.WARNING, logger="proxbit"):
        make(max_steps=2, save_strategy="no").train()
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "Removed what a save that was cut short has left"
    ]
    assert STAGING not in names(tmp_path / "out")


class Trains(TrainerCallback):
    """Remembers what a second training in the same folder says, which is begun in the middle of this one."""

    def __init__(self, second, folder):
        self.second, self.folder, self.said = second, folder, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            (self.folder / STAGING / "0123abcd" / "checkpoint-9").mkdir(parents=True)  # as if this one were saving
            for resume in (None, True, str(self.folder / "checkpoint-2")):
                with pytest.raises(CheckpointError) as error:
                    self.second.train(resume_from_checkpoint=resume)
                self.said.append(str(error.value))
            self.left = names(self.folder)


def test_a_second_training_in_the_same_folder_is_refused(tmp_path, make):
    """Nothing of the first one is touched, and the folder is free when it has ended."""
    trains = Trains(make(), tmp_path / "out")
    make([trains], save_strategy="steps").train()
    assert trains.said == [trains.said[0]] * 3
    assert trains.said[0].startswith(f"{tmp_path / 'out'} is being written by process {os.getpid()} on ")
    assert trains.left == {"checkpoint-2", STAGING, LOCK, "proxbit_run.jsonl"}
    assert LOCK not in names(tmp_path / "out") and names(tmp_path / "out" / STAGING) == {"0123abcd"}
    trains.second.train(resume_from_checkpoint=True)
    assert trains.second.state.global_step == 6 and STAGING not in names(tmp_path / "out")


def test_a_training_that_fails_gives_the_folder_back(tmp_path, make):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        make().train(resume_from_checkpoint=True)
    trainer = make()
    trainer.compute_loss = lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert LOCK not in names(tmp_path / "out")
    make(max_steps=1).train()


def test_an_evaluation_needs_no_lock(tmp_path, make):
    with locked(tmp_path / "out" / LOCK, tmp_path / "out"):
        assert make().evaluate()["eval_loss"] > 0


def test_a_file_system_without_locks(tmp_path, make, monkeypatch, caplog):
    """As before there were any, with a line in the log; what another one may be saving stays."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / "out" / STAGING / "0123abcd" / "checkpoint-9").mkdir(parents=True)
    with caplog.at_level(logging.WARNING, logger="proxbit"):
        make(max_steps=2).train()
    assert names(tmp_path / "out" / STAGING) == {"0123abcd"} and (tmp_path / "out" / "checkpoint-2").is_dir()
    (line,) = caplog.messages
    assert "cannot be locked (No locks available)" in line


def test_damage_of_the_state_of_the_trainer_is_seen(tmp_path, make, caplog):
    make(max_steps=4).train()
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").write_bytes(b"\0" * 100)
    with caplog.at_level(logging.WARNING, logger="proxbit"):
        trainer = make(max_steps=4)
        trainer.train(resume_from_checkpoint=True)
    assert any("checkpoint-4, which is not complete: trainer_state.json" in line for line in caplog.messages)
    assert trainer.state.global_step == 4


def test_an_output_folder_that_cannot_be_used(tmp_path, make):
    """A file lies where the staging folder would."""
    trainer = make()
    (tmp_path / "out" / STAGING).write_text("mine")
    with pytest.raises(CheckpointError, match="No checkpoint can be written into"):
        trainer.train()
