"""The callback that moves mu: from the number of the step alone."""

import pytest
from torch import nn
from transformers import TrainerControl, TrainerState

import proxbit
from proxbit.config import BinarizationConfig
from proxbit.errors import MuRangeError
from proxbit.nn import latent_layers
from proxbit.quantizers import MuSchedule
from proxbit.training import MuCallback


@pytest.fixture
def model():
    layers = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    return proxbit.binarize(layers, BinarizationConfig(weights="bnn++", include=["*"]))


def state(step, steps=10):
    return TrainerState(global_step=step, max_steps=steps)


def linear(steps):
    """mu from 1 to 8 in the 8 soft steps of 10."""
    return MuSchedule("linear", 1.0, 8.0, steps, hard_fraction=0.2)


def seen(model):
    return {(float(layer.mu), layer.hardened) for _, layer in latent_layers(model)}


def test_every_step_has_its_mu(model):
    callback = MuCallback(model, linear)
    callback.on_train_begin(None, state(0), TrainerControl())
    for step in range(10):
        callback.on_step_begin(None, state(step), TrainerControl())
        assert seen(model) == {(min(step + 1.0, 8.0), step >= 8)}


def test_resuming_goes_where_training_stopped(model):
    """Before the first step already: an evaluation may come first. Steps may then come in any order."""
    callback = MuCallback(model, linear)
    callback.on_train_begin(None, state(9), TrainerControl())
    assert seen(model) == {(8.0, True)}
    callback.on_step_begin(None, state(2), TrainerControl())
    assert seen(model) == {(3.0, False)}


def test_the_schedule_is_made_when_training_begins(model):
    steps = []

    def begin(count):
        steps.append(count)
        return linear(count)

    callback = MuCallback(model, begin)
    assert steps == []
    callback.on_train_begin(None, state(0, steps=40), TrainerControl())
    callback.on_step_begin(None, state(0, steps=40), TrainerControl())
    assert steps == [40]
    callback.on_train_begin(None, state(0, steps=20), TrainerControl())
    assert steps == [40, 20]


def test_a_mu_out_of_range_changes_nothing(model):
    before = seen(model)
    callback = MuCallback(model, lambda steps: MuSchedule("constant", -1.0, -1.0, steps))
    with pytest.raises(MuRangeError, match="mu = -1"):
        callback.on_train_begin(None, state(0), TrainerControl())
    assert seen(model) == before
