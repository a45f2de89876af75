"""What is no number is found, and named."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from proxbit.errors import LossError
from proxbit.training.monitor import FiniteWatch

BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.fixture
def watch():
    Accelerator(cpu=True)
    return FiniteWatch()


@pytest.mark.parametrize("bad", BAD)
def test_the_first_loss_that_is_no_number_is_named(watch, bad):
    for step, loss in enumerate([1.0, 2.0, bad, 3.0, bad], 1):
        watch.see(torch.tensor(loss, requires_grad=True), step)
    with pytest.raises(LossError, match="The loss of rank 0 was NaN or infinite at step 3"):
        watch.check(5)


def test_numbers_are_left_alone(watch):
    for step, loss in enumerate([0.0, -1e30, 3e38], 1):
        watch.see(torch.tensor(loss), step)
    watch.check(3, nn.Linear(2, 2))


@pytest.mark.parametrize(("name", "bad"), [("0.weight", BAD[0]), ("1.bias", BAD[1]), ("0.weight", BAD[2])])
def test_a_weight_is_named(watch, name, bad):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    with torch.no_grad():
        model.get_parameter(name).flatten()[-1] = bad
    watch.check(7)
    with pytest.raises(LossError, match=rf"^{name} holds NaN or infinite values after step 7 \(rank 0\)"):
        watch.check(7, model)


def test_in_fp16_steps_that_overflow_are_skipped(watch, monkeypatch):
    """So their losses say nothing; the weights do."""
    monkeypatch.setattr(type(watch.state), "mixed_precision", "fp16")
    watch.see(torch.tensor(float("inf")), 1)
    watch.check(1)
