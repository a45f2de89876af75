"""SIGTERM: who gets it, and when."""

import os
import signal

import pytest
from accelerate import Accelerator
from transformers import TrainerControl, TrainerState, TrainingArguments

from proxbit.training.saving import SaveAtSigterm


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(str(tmp_path), use_cpu=True)


@pytest.fixture
def callback(args):
    return SaveAtSigterm(Accelerator(cpu=True))


def step(callback, args, save=True):
    """What the Trainer does at the end of a step; returns whether it is asked to save."""
    state, control = TrainerState(), TrainerControl()
    callback.on_step_end(args, state, control)
    if save and control.should_save:
        callback.on_save(args, state, control)
    callback.leave_once_saved(state)
    return control.should_save


def test_a_step_is_saved_and_then_the_process_ends(callback, args):
    with pytest.raises(SystemExit) as ended, callback.listening():
        assert not step(callback, args)
        os.kill(os.getpid(), signal.SIGTERM)
        step(callback, args)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_save_that_something_else_prevents_is_asked_for_again(callback, args):
    """save_strategy="best" forgets what was asked for when it has evaluated."""
    with pytest.raises(SystemExit), callback.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert step(callback, args, save=False)
        step(callback, args)


def test_a_save_without_sigterm_ends_nothing(callback, args):
    with callback.listening():
        callback.on_save(args, TrainerState(), TrainerControl())
        callback.leave_once_saved(TrainerState())


def test_a_signal_that_no_step_answered_goes_to_whom_it_went_before(callback):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("before"))
    try:
        with callback.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == []
        assert heard == ["before"]
    finally:
        signal.signal(signal.SIGTERM, before)
