"""What a training leaves for its report: layers against direct counts, where it goes on, what it leaves alone."""

import errno
import logging
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event
from transformers import TrainerCallback, ViTForImageClassification

import proxbit
from proxbit.analysis.report import write_report
from proxbit.analysis.run_log import RUN_LOG, append_event, read_log, start_log
from proxbit.config import BinarizationConfig
from proxbit.nn import latent_layers
from proxbit.training import ProxConnectArguments, ProxConnectTrainer
from proxbit.training.metrics import classification_metrics
from proxbit.training.recorder import start_file
from tiny_models import LABELS, SIDE, vit


def make(pair="bnn++", **changes):
    torch.manual_seed(1)
    model = ViTForImageClassification(vit(id2label={0: "roof", 1: "flower", 2: "<b>sky"}))
    return proxbit.binarize(model, BinarizationConfig(weights=pair, **changes))


def examples(crops, count):
    return [{"pixel_values": image, "labels": i % LABELS} for i, image in enumerate(crops(count, SIDE))]


def prepare(folder, crops, model=None, callbacks=None, **changes):
    fixed = dict(report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", logging_steps=2)
    training = dict(per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2, eval_steps=3, hard_fraction=0.5)
    return ProxConnectTrainer(
        model=make() if model is None else model,
        args=ProxConnectArguments(str(folder), **(fixed | training | changes)),
        train_dataset=examples(crops, 8),
        eval_dataset=examples(crops, 12),
        callbacks=callbacks,
        compute_metrics=classification_metrics,
    )


class Latents(TrainerCallback):
    """The latents when training begins, and after every step."""

    def __init__(self):
        self.found = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.found.append({name: layer.weight.detach().numpy().copy() for name, layer in latent_layers(model)})

    on_step_end = on_train_begin


def row_units(weight):
    rows = weight.reshape(len(weight), -1).astype(np.float32)
    return rows / np.abs(rows).mean(1, keepdims=True)


def test_a_run_from_beginning_to_end(tmp_path, crops):
    """Logs are those of the Trainer; layers are counted anew from the weights; then the page is made of it."""
    latents, model = Latents(), make(include=["*.mlp.*", "vit.embeddings.patch_embeddings.projection"])
    trainer = prepare(tmp_path, crops, model, [latents], eval_strategy="steps")
    trainer.train()
    log = read_log(tmp_path)
    names = list(latents.found[0])
    assert [layer["name"] for layer in log.run["layers"]] == names
    assert [tuple(layer["shape"]) for layer in log.run["layers"]] == [w.shape for w in latents.found[0].values()]
    assert {layer["kind"] for layer in log.run["layers"]} == {"BinaryLinear", "BinaryConv2d"}
    assert {layer["pair"] for layer in log.run["layers"]} == {"bnn++"}
    assert (log.run["model"], log.run["steps"], log.run["settings"]["learning_rate"]) == (type(model).__name__, 6, 1e-2)
    assert log.run["binary_parameters"] == sum(weight.size for weight in latents.found[0].values())

    def numbers(rows):
        return [{key: row[key] for key in row if key not in ("event", "hard", "total_flos")} for row in rows]

    assert numbers(log.logs) == numbers(trainer.state.log_history)
    assert [row["hard"] for row in log.logs if "loss" in row] == [False, True, True]

    assert [row["step"] for row in log.layers] == [0, 2, 4, 6]
    edges = np.array([-np.inf, *np.linspace(-3, 3, 42), np.inf])
    for row, before in zip(log.layers, [None, 0, 2, 4], strict=True):
        for place, name in enumerate(names):
            weight = latents.found[row["step"]][name]
            counts = np.histogram(row_units(weight), edges)[0]
            assert sum(row["latents"][place]) == weight.size
            # Values on an edge may fall to either side.
            assert np.abs(np.cumsum(counts) - np.cumsum(row["latents"][place])).max() <= 2
            if before is not None:
                flipped = (latents.found[before][name] >= 0) != (weight >= 0)
                assert row["flip_ratio"][place] == pytest.approx(flipped.mean(), abs=1e-6)
    assert log.layers[0]["flip_ratio"] is None
    assert max(log.layers[-1]["flip_ratio"]) > 0

    assert (log.predictions["step"], log.predictions["total"]) == (6, 12)
    assert {one["label"] for one in log.predictions["pictures"]} == {"roof", "flower", "<b>sky"}
    text = write_report(tmp_path).read_text()
    assert "6 of 6 steps" in text and "&lt;b&gt;sky" in text and "<b>sky" not in text


def test_nothing_is_written_without_logs(tmp_path, crops):
    trainer = prepare(tmp_path, crops, logging_strategy="no", eval_strategy="steps")
    trainer.train()
    trainer.evaluate()
    assert not (tmp_path / RUN_LOG).exists()


def test_an_evaluation_alone_leaves_the_log_of_an_earlier_run(tmp_path, crops):
    prepare(tmp_path, crops).train()
    before = (tmp_path / RUN_LOG).read_bytes()
    prepare(tmp_path, crops).evaluate()
    assert (tmp_path / RUN_LOG).read_bytes() == before


def test_evaluations_after_the_training_take_the_place_of_the_pictures(tmp_path, crops):
    trainer = prepare(tmp_path, crops)
    trainer.train()
    assert read_log(tmp_path).predictions is None
    trainer.evaluate()
    assert read_log(tmp_path).predictions["total"] == 12
    trainer.evaluate(examples(crops, 5))
    trainer.predict(examples(crops, 7))
    assert read_log(tmp_path).predictions["total"] == 5
    assert (tmp_path / RUN_LOG).read_text().count('"event":"predictions"') == 1
    assert read_log(tmp_path).logs[-1]["eval_accuracy"] == trainer.state.log_history[-1]["eval_accuracy"]


def test_an_evaluation_once_the_folder_is_gone(tmp_path, crops):
    trainer = prepare(tmp_path / "out", crops)
    trainer.train()
    shutil.rmtree(tmp_path / "out")
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    assert not (tmp_path / "out").exists()


def test_recording_does_not_disturb(tmp_path, crops):
    """The weights at the end are those of a training without logs."""
    ends = []
    for strategy in ("steps", "no"):
        model = make()
        settings = dict(logging_strategy=strategy, logging_steps=1, eval_strategy="steps")
        prepare(tmp_path / strategy, crops, model, **settings).train()
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_snapshots_are_bounded(tmp_path, crops, monkeypatch):
    """One at the beginning, one at the first log, and as many as there may be."""
    monkeypatch.setattr("proxbit.training.recorder.SNAPSHOTS", 4)
    prepare(tmp_path, crops, max_steps=16, logging_steps=1).train()
    log = read_log(tmp_path)
    assert sum("loss" in row for row in log.logs) == 16
    assert [row["step"] for row in log.layers] == [0, 1, 4, 8, 12, 16]


class StopAt(TrainerCallback):
    """Ends a training early."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(
    ("steps", "every", "stop", "found"),
    [(5, 500, 5, [0, 5]), (5, 2, 5, [0, 2, 4, 5]), (6, 2, 6, [0, 2, 4, 6]), (9, 2, 3, [0, 2, 3])],
)
def test_the_end_is_kept_where_no_log_is(tmp_path, crops, steps, every, stop, found):
    """However many steps a log takes, and with another model, the best one, in its place at the end."""
    latents, model = Latents(), make()
    settings = dict(max_steps=steps, logging_steps=every, eval_strategy="steps", eval_steps=2, save_steps=2)
    best = dict(save_strategy="steps", load_best_model_at_end=True, learning_rate=0.1)
    prepare(tmp_path, crops, model, [latents, StopAt(stop)], **settings, **best).train()
    log = read_log(tmp_path)
    assert [row["step"] for row in log.layers] == found
    last, before = latents.found[stop], latents.found[found[-2]]
    for place, name in enumerate(last):
        counts = np.histogram(row_units(last[name]), np.array([-np.inf, *np.linspace(-3, 3, 42), np.inf]))[0]
        assert np.abs(np.cumsum(counts) - np.cumsum(log.layers[-1]["latents"][place])).max() <= 2
        flipped = (before[name] >= 0) != (last[name] >= 0)
        assert log.layers[-1]["flip_ratio"][place] == pytest.approx(flipped.mean(), abs=1e-6)
    assert "No flips have been counted yet" not in write_report(tmp_path).read_text()


def test_a_training_that_resumes_goes_on_in_the_same_file(tmp_path, crops):
    settings = dict(save_strategy="steps", save_steps=2)
    prepare(tmp_path, crops, **settings).train()
    whole = read_log(tmp_path)
    checkpoint = tmp_path / "checkpoint-4"
    prepare(tmp_path, crops, **settings).train(resume_from_checkpoint=str(checkpoint))
    resumed = read_log(tmp_path)
    assert [(row["step"], "loss" in row) for row in resumed.logs] == [
        (row["step"], "loss" in row) for row in whole.logs
    ]
    assert [(row["step"], row["latents"]) for row in resumed.layers] == [
        (row["step"], row["latents"]) for row in whole.layers
    ]


def end_with(text):
    """A damage: what the file of a run has behind its first four lines."""

    def damage(path):
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]) + text)

    return damage


def become_a_folder(path):
    path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("mine")


DAMAGES = {
    "zeros": end_with(b"\0" * 512),
    "zeros and more": end_with(b"\0" * 512 + b"\n"),
    "a line cut short": end_with(b'{"event":"log","st\n{"event":"log","step":2}\n'),
    "not UTF-8": end_with(b'{"event":"log","step":2,"x":"\xff"}\n'),
    "a list": end_with(b"[1, 2]\n"),
    "no record": end_with(b'{"loss": 1.0}\n'),
    "step is text": end_with(b'{"event":"log","step":"2"}\n'),
    "too deep": end_with(b"[" * 10**6 + b"\n"),
    "too long a number": end_with(b"9" * 10**5 + b"\n"),
    "no first line": lambda path: path.write_text('{"event":"log","step":1}\n'),
    "of a newer version": lambda path: path.write_text('{"event":"run","format":99,"step":0}\n'),
    "nothing": lambda path: path.write_text(""),
    "a folder": become_a_folder,
}


@pytest.fixture
def resumable(tmp_path, crops):
    """A run of two steps, with a checkpoint at its end."""
    prepare(tmp_path, crops, max_steps=2, save_strategy="steps", save_steps=2, logging_steps=1).train()
    return tmp_path


def resume(folder, crops, steps=4):
    prepare(folder, crops, max_steps=steps, logging_steps=1).train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def tree(path):
    """What lies at a path: the bytes of a file, or of those in a folder."""
    return {each.name: each.read_bytes() for each in path.iterdir()} if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_put_aside_and_training_resumes(tmp_path, damage):
    """Nothing of it is lost; a second one gets a name of its own."""
    path = tmp_path / RUN_LOG
    start_log(tmp_path, {"model": "Vit"})
    for step in (1, 2, 3):
        append_event(tmp_path, {"event": "log", "step": step, "loss": 1.0})
    DAMAGES[damage](path)
    before = tree(path)
    kept = set() if damage == "zeros" else {f"{RUN_LOG}.damaged-1"}  # without its end a last line is nobody's
    start_file(str(tmp_path), {"model": "Vit"}, 2)
    assert {each.name for each in tmp_path.iterdir()} == {RUN_LOG} | kept
    assert all(tree(tmp_path / name) == before for name in kept)
    assert [row["step"] for row in read_log(tmp_path).logs] == ([1, 2] if damage == "zeros" else [])
    path.write_bytes(b"\0\n")
    start_file(str(tmp_path), {"model": "Vit"}, 2)
    assert (tmp_path / f"{RUN_LOG}.damaged-{len(kept) + 1}").read_bytes() == b"\0\n"


def test_a_training_resumes_beside_a_damaged_file(resumable, crops, caplog):
    (resumable / RUN_LOG).write_bytes(b"\x1b[2J\0\n")
    with caplog.at_level(logging.WARNING, logger="proxbit"):
        resume(resumable, crops)
    assert [row["step"] for row in read_log(resumable).logs] == [3, 4, 4]
    assert (resumable / f"{RUN_LOG}.damaged-1").read_bytes() == b"\x1b[2J\0\n"
    (line,) = caplog.messages
    assert f"{RUN_LOG} is damaged, and lies in {RUN_LOG}.damaged-1 now" in line and "begins at step 2" in line
    assert "\n" not in line and "\x1b" not in line
    write_report(resumable)


def test_a_damaged_file_that_cannot_be_put_aside_stays(resumable, crops, caplog, monkeypatch):
    (resumable / RUN_LOG).write_bytes(b"\0\n")
    rename = type(resumable).rename

    def refuse(self, target):
        if self.name == RUN_LOG:
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(type(resumable), "rename", refuse)
    with caplog.at_level(logging.WARNING, logger="proxbit"):
        resume(resumable, crops)
    assert (resumable / RUN_LOG).read_bytes() == b"\0\n"
    (line,) = caplog.messages
    assert "cannot be written ([Errno 13] Permission denied)" in line


class Breaks(TrainerCallback):
    """Does something to the file of the run when a step begins."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def test_a_disk_that_fills_up_costs_lines_and_not_the_training(tmp_path, crops, caplog):
    """The file is on a device that is full (/dev/full) from step 1 to 3."""
    path = tmp_path / RUN_LOG

    def fill():
        path.rename(tmp_path / "whole")
        path.symlink_to("/dev/full")

    def mend():
        (tmp_path / "whole").rename(path)

    trainer = prepare(tmp_path, crops, callbacks=[Breaks(1, fill), Breaks(3, mend)], logging_steps=1, max_steps=4)
    with caplog.at_level(logging.WARNING, logger="proxbit"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert [row["step"] for row in read_log(tmp_path).logs] == [1, 4, 4]
    (line,) = caplog.messages
    assert line == f"{path} cannot be written ([Errno 28] No space left on device): `proxbit report` will lack it."


@pytest.mark.parametrize("action", ["damaged", "gone"])
def test_a_file_that_breaks_in_the_middle_does_not_end_the_training(tmp_path, crops, caplog, action):
    """At its end images are added, for which all lines are read."""
    path = tmp_path / "out" / RUN_LOG

    def act():
        path.write_bytes(b"\0\n") if action == "damaged" else shutil.rmtree(tmp_path / "out")

    trainer = prepare(tmp_path / "out", crops, callbacks=[Breaks(2, act)], eval_strategy="epoch", max_steps=4)
    with caplog.at_level(logging.WARNING, logger="proxbit"):
        trainer.train()
    assert trainer.state.global_step == 4 and len(caplog.messages) == 1
    assert path.read_bytes().startswith(b"\0\n") if action == "damaged" else not path.exists()


def test_a_file_that_cannot_be_begun(tmp_path, crops, caplog, monkeypatch):
    """Lines of this run do not get into the file of an earlier one."""
    prepare(tmp_path, crops, max_steps=1).train()
    before = (tmp_path / RUN_LOG).read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
    with caplog.at_level(logging.WARNING, logger="proxbit"):
        prepare(tmp_path, crops, max_steps=2).train()
    assert (tmp_path / RUN_LOG).read_bytes() == before and len(caplog.messages) == 1
    assert [each.name for each in tmp_path.iterdir()] == [RUN_LOG]


def scalars(folder):
    """The numbers in the files of TensorBoard: records of length, checksum, `Event`, checksum."""
    found = {}
    for path in folder.rglob("events.out.tfevents.*"):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            place += 16 + length
    return found


def test_live_logs_reach_tensorboard(tmp_path, crops, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", os.fspath(tmp_path / "board"))
    trainer = prepare(tmp_path / "out", crops, report_to="tensorboard", eval_strategy="steps")
    trainer.train()
    found = scalars(tmp_path / "board")
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        for key in ("mu", "flip_ratio", "hardening_gap"):
            assert found[f"train/{key}", row["step"]] == pytest.approx(row[key], rel=1e-6)
    assert found["eval/soft_accuracy", 6] == pytest.approx(trainer.state.log_history[-2]["eval_soft_accuracy"])
