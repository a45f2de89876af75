"""Checkpoints of two processes: resumed as if training had not stopped, and by another number of processes."""

import pytest
import torch

from distributed_runs import fit
from tiny_models import SIDE

pytestmark = pytest.mark.xdist_group("processes")

# The stop falls inside an epoch, in the soft part; the last steps are hard.
SETTINGS = dict(max_steps=8, hard_fraction=0.25, save_strategy="steps", save_steps=4)


@pytest.fixture(scope="module")
def images(crops):
    return crops(24, SIDE)


def check(first, second, tolerance=0.0):
    assert first["weights"].keys() == second["weights"].keys()
    for name, value in first["weights"].items():
        assert float((second["weights"][name] - value).abs().max()) <= tolerance, name
    assert len(first["curve"]) == len(second["curve"]) == 8
    for one, other in zip(first["curve"], second["curve"]):
        assert one == pytest.approx(other, abs=10 * tolerance)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2_full", "fsdp2_sharded_checkpoints"])
def test_resuming_is_as_if_training_had_not_stopped(tmp_path, processes, images, engine):
    whole, _ = processes(fit, engine, tmp_path, images, **SETTINGS)
    checkpoint = str(tmp_path / "checkpoint-4")
    again, other = processes(fit, engine, tmp_path, images, model=dict(seed=2), resume=checkpoint, **SETTINGS)
    check(whole, again)
    assert all(torch.equal(value, other["weights"][name]) for name, value in again["weights"].items())


def test_another_number_of_processes(tmp_path, processes, images):
    """From two to one, and back."""
    two, _ = processes(fit, "ddp", tmp_path / "two", images, **SETTINGS)
    double = SETTINGS | dict(per_device_train_batch_size=8)
    one = fit("one", tmp_path / "one", images, **double)
    resumed = fit("one", tmp_path / "one", images, resume=str(tmp_path / "two" / "checkpoint-4"), **double)
    check(two, resumed, tolerance=2e-5)
    resumed, _ = processes(
        fit, "ddp", tmp_path / "two", images, resume=str(tmp_path / "one" / "checkpoint-4"), **SETTINGS
    )
    check(one, resumed, tolerance=2e-5)


def test_four_processes_go_on_where_two_stopped(tmp_path, processes, four_processes, images):
    """Every process has written its part, and reads others."""
    kind, checkpoint = "fsdp2_sharded_checkpoints", str(tmp_path / "checkpoint-4")
    two, _ = processes(fit, kind, tmp_path, images, **SETTINGS)
    sizes = dict(per_device_train_batch_size=2, per_device_eval_batch_size=2)
    four = four_processes(fit, kind, tmp_path, images, model=dict(seed=2), resume=checkpoint, **SETTINGS, **sizes)
    for each in four:
        check(two, each, tolerance=2e-5)
