"""`ProxConnectTrainer` in two processes: DDP and FSDP2 give what one process gives with twice the batch."""

import json
import sys

import pytest
import torch
from transformers import ViTForImageClassification

from distributed_runs import apart, fit, make, other_bits, traffic
from tiny_models import SIDE

pytestmark = pytest.mark.xdist_group("processes")

STEPS = 8
SHORT = dict(max_steps=STEPS, hard_fraction=0.25)


def other_share(first, second):
    """The share of the packed bits that differ."""
    different, count = other_bits(first, second)
    return different / count


def same_weights(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def images(crops):
    return crops(24, SIDE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images):
    """One process with twice the batch, 50 steps."""
    return fit("one", tmp_path_factory.mktemp("one"), images, per_device_train_batch_size=8)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2_full"])
def test_two_processes_are_one_with_twice_the_batch(tmp_path, processes, images, whole, engine, capsys):
    """50 steps, the last of them hard: losses, flips, evaluations, and the bits that ship."""
    first, second = processes(fit, engine, tmp_path, images)
    assert first["distributed"] == {"ddp": "DistributedType.MULTI_CPU", "fsdp2_full": "DistributedType.FSDP"}[engine]
    differences = apart(whole["curve"], first["curve"])
    assert len(first["curve"]) == 50
    assert differences["loss"] < 1e-5 and differences["hardening_gap"] < 1e-5
    assert differences["mu"] == differences["learning_rate"] == differences["flip_ratio"] == 0
    assert first["curve"] == second["curve"]
    same_weights(first["weights"], second["weights"])
    for key, value in whole["evaluation"].items():
        assert first["evaluation"][key] == second["evaluation"][key] == pytest.approx(value, abs=1e-5)
    share = other_share(whole["packed"], first["packed"])
    with capsys.disabled():
        sys.stdout.write(f"\n{engine}: {share:.5%} of the packed bits differ from those of one process\n")
    assert share <= 1e-3
    same_weights(first["packed"], second["packed"])


def test_four_processes_in_two_groups(tmp_path, four_processes, images):
    """Weights are spread within a group, and gradients averaged over both."""
    steps = dict(max_steps=4, hard_fraction=0.25)
    alone = fit("one", tmp_path / "one", images, per_device_train_batch_size=8, **steps)
    sizes = dict(per_device_train_batch_size=2, per_device_eval_batch_size=2)
    first, *others = four_processes(fit, "fsdp2_hybrid", tmp_path / "four", images, **steps, **sizes)
    differences = apart(alone["curve"], first["curve"])
    assert differences["loss"] < 1e-5 and differences["flip_ratio"] == 0
    assert other_share(alone["packed"], first["packed"]) <= 1e-3
    for other in others:
        assert other["curve"] == first["curve"]
        same_weights(first["weights"], other["weights"])
        same_weights(first["packed"], other["packed"])


def test_the_run_is_written_once(tmp_path, processes, images):
    processes(fit, "fsdp2_full", tmp_path, images, **SHORT)
    events = [json.loads(line) for line in (tmp_path / "proxbit_run.jsonl").read_text().splitlines()]
    logs = [event for event in events if event["event"] == "log" and "loss" in event]
    assert [event["step"] for event in logs] == list(range(1, STEPS + 1))
    layers = [event for event in events if event["event"] == "layers"]
    weights = sum(map(sum, layers[0]["latents"]))
    alone = tmp_path / "alone"
    fit("one", alone, images, per_device_train_batch_size=8, **SHORT)
    reference = [json.loads(line) for line in (alone / "proxbit_run.jsonl").read_text().splitlines()]
    (before, *_) = [event for event in reference if event["event"] == "layers"]
    assert layers[0]["latents"] == before["latents"] and weights > 10_000


@pytest.fixture(
    scope="module",
    params=[
        dict(recipe="w1a8", teacher=True),
        dict(recipe="w1a4", gradient_accumulation_steps=2, per_device_train_batch_size=2),
        dict(recipe="w1a1-two-stage", progression="taylor"),
    ],
    ids=["int8 with a teacher", "learned steps, accumulated", "thresholds, layer by layer"],
)
def recipe(request, tmp_path_factory, images):
    """Arguments, and what one process makes of them with twice the batch."""
    model = dict(latent=False, dtype=torch.float64)
    given = SHORT | dict(model=model, per_device_train_batch_size=4) | request.param
    double = given | dict(per_device_train_batch_size=2 * given["per_device_train_batch_size"])
    return given, fit("one", tmp_path_factory.mktemp("one"), images[:8], **double)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2_full"])
def test_recipes(tmp_path, processes, images, engine, recipe):
    """Calibrated from all examples; also with layers that wait, whose parameters have no gradients yet. In double
    precision: sums in another order then move no activation from one code to the next.
    """
    given, alone = recipe
    first, second = processes(fit, engine, tmp_path, images[:8], **given)
    assert apart(alone["curve"], first["curve"])["loss"] < 1e-6  # added up in fp32 by the Trainer
    same_weights(first["weights"], second["weights"])
    same_weights(alone["weights"], first["weights"], tolerance=1e-9)
    assert other_share(alone["packed"], first["packed"]) == 0


@pytest.mark.parametrize("engine", ["ddp", "fsdp2_full"])
def test_the_best_model_is_loaded_at_the_end(tmp_path, processes, images, engine):
    """Both processes end with the same weights, those of the best checkpoint; DDP in bf16, which the Trainer has with
    FSDP on accelerators only.
    """
    best = dict(load_best_model_at_end=True, metric_for_best_model="accuracy", eval_strategy="steps", eval_steps=4)
    given = SHORT | best | dict(bf16=engine == "ddp", save_strategy="steps", save_steps=4, learning_rate=5e-3)
    first, second = processes(fit, engine, tmp_path, images, **given)
    same_weights(first["weights"], second["weights"])
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert first["evaluation"]["eval_accuracy"] == pytest.approx(state["best_metric"])
    saved = ViTForImageClassification.from_pretrained(state["best_model_checkpoint"]).state_dict()
    assert all(torch.equal(first["weights"][name], value) for name, value in saved.items())


def test_gradients_are_as_many_bytes_as_those_of_the_float_model(processes, images, capsys):
    """And half of them, or fewer, with hooks of torch."""
    sent = {hook: processes(traffic, images, True, hook)[0] for hook in ("none", "fp16", "powerSGD")}
    weights = sum(parameter.numel() for parameter in make().parameters())
    assert processes(traffic, images, False, "none")[0] == sent["none"] == 4 * weights
    assert sent["fp16"] == 2 * weights
    assert sent["powerSGD"] < sent["none"] / 4
    with capsys.disabled():
        sys.stdout.write(f"\nbytes of gradients in a step: {sent}\n")
