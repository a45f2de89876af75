"""The callback of the step: mu from the number of the step alone, where an update starts, and how a run ends."""

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments, ViTForImageClassification

import proxbit
from proxbit.config import BinarizationConfig
from proxbit.errors import MuRangeError
from proxbit.nn import latent_layers
from proxbit.quantizers import MuSchedule
from proxbit.training import LayerScores, MuCallback, ProxConnectArguments, ProxConnectTrainer, stages
from tiny_models import LABELS, SIDE, vit

RATE, STEPS = 0.5, 3


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


def test_a_run_that_stopped_in_a_stage_leaves_nothing_waiting(model):
    """The next one of the same model has its own stages, or none; one that resumes has those of its step."""
    halves = MuCallback(model, linear, lambda steps: stages(model, steps, activations_first=0.5))
    layers = [layer for _, layer in latent_layers(model)]
    halves.on_train_begin(None, state(0), TrainerControl())
    halves.on_step_begin(None, state(3), TrainerControl())
    assert all(layer.waits == {"weight"} for layer in layers)
    MuCallback(model, linear).on_train_begin(None, state(0), TrainerControl())
    assert all(layer.waits == set() for layer in layers)
    for step, waits in ((3, {"weight"}), (5, set())):
        halves.on_train_begin(None, state(step), TrainerControl())
        assert all(layer.waits == waits for layer in layers)


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


def test_only_pairs_that_say_so_start_elsewhere():
    """The callback moves the latents of proxquant, before the step of the optimizer, and of no other pair."""
    for pair, moves in (("proxquant", True), ("rpc", True), ("pc", False), ("bnn++", False)):
        model = proxbit.binarize(nn.Sequential(nn.Linear(5, 4)), BinarizationConfig(weights=pair, include=["*"]))
        callback = MuCallback(model, lambda steps: MuSchedule("constant", 0.3, 0.3, steps))
        before = model[0].weight.detach().clone()
        callback.on_train_begin(None, state(0), TrainerControl())
        callback.on_step_begin(None, state(0), TrainerControl())
        assert torch.equal(model[0].weight, before)
        model[0].weight.grad = torch.ones_like(model[0].weight)
        callback.on_pre_optimizer_step(None, state(0), TrainerControl())
        assert torch.equal(model[0].weight, before) is not moves


def quantized(rows, mu):
    """By up to mu nearer to -1 or +1."""
    size = rows.abs()
    return torch.where(rows >= 0, 1.0, -1.0).to(rows.dtype) * (size + (1 - size).clamp(-mu, mu))


def unit(weight, units, proximal, mu):
    """P of a weight in the units of its rows, and the factor between the gradients of P(W) and of W."""
    rows = weight.flatten(1)
    divisor = torch.ones(len(rows), 1).to(rows) if units == "raw" else rows.abs().mean(dim=1, keepdim=True)
    q = proximal(rows / divisor, mu)
    factor = divisor if units == "raw" else (q * rows).sum(1, keepdim=True) / (q * q).sum(1, keepdim=True)
    return (factor * q).view_as(weight), factor / divisor


def by_hand(model, names, pixels, labels, pair, units):
    """Plain gradient descent on a float model; the latents step from P(w*), with the gradient there or at w*."""
    latents = {name: model.get_parameter(name).detach().clone() for name in names}
    for mu in (0.05, 0.125, 0.2):
        gains, starts = {}, {}
        for name, latent in latents.items():
            starts[name], gains[name] = unit(latent, units, quantized, mu)
            model.get_parameter(name).data.copy_(starts[name] if pair == "proxquant" else latent)
        model.zero_grad()
        nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels).backward()
        for name, parameter in model.named_parameters():
            if name in latents:
                gain = gains[name].view(-1, *[1] * (parameter.dim() - 1)) if pair == "proxquant" else 1
                latents[name] = starts[name] - RATE * gain * parameter.grad
            else:
                parameter.data.sub_(RATE * parameter.grad)
    return latents | {name: p.detach() for name, p in model.named_parameters() if name not in latents}


@pytest.mark.filterwarnings("ignore:Training ended soft")
@pytest.mark.parametrize("units", ["raw", "rows"])
@pytest.mark.parametrize("pair", ["proxquant", "rpc"])
def test_a_step_from_the_proximal_map(tmp_path, crops, pair, units):
    """ProxQuant: w* <- P(w*) - lr g(P(w*)); reverse ProxConnect: w* <- P(w*) - lr g(w*)."""
    model = ViTForImageClassification(vit(initializer_range=0.3)).double()
    plain = copy.deepcopy(model)
    scaling = dict(normalize="none", scale="fixed") if units == "raw" else {}
    include = ["vit.layers.*", "vit.embeddings.patch_embeddings.projection"]
    proxbit.binarize(model, BinarizationConfig(weights=pair, include=include, **scaling))
    pixels, labels = crops(4, SIDE).double(), torch.arange(4) % LABELS
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = ProxConnectArguments(
        str(tmp_path),
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        mu_schedule="linear",
        mu_start=0.05,
        mu_end=0.2,
        hard_fraction=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    examples = [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]
    ProxConnectTrainer(model=model, args=arguments, train_dataset=examples).train()
    names = [f"{name}.weight" for name, _ in latent_layers(model)]
    assert len(names) == 13
    expected = by_hand(plain, names, pixels, labels, pair, units)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-11, msg=name)
    assert all((expected[name] - before[name]).abs().max() > 0.01 for name in names)


def test_a_run_that_ends_soft_is_told(model, recwarn):
    """The gap and mu are in the warning; a run that ends hard has none."""
    arguments = ProxConnectArguments("unused", hard_fraction=0.0, use_cpu=True, report_to="none")
    callback = MuCallback(model, linear)
    callback.on_train_begin(None, state(2), TrainerControl())
    with pytest.warns(UserWarning, match=r"ended soft, at mu = 3: the hardening gap .* is 0\.\d+,.*at step 8 of 10"):
        callback.on_train_end(arguments, state(2), TrainerControl())
    recwarn.clear()
    callback.on_step_begin(None, state(9), TrainerControl())
    callback.on_train_end(arguments, state(10), TrainerControl())
    assert not list(recwarn)


def test_a_run_too_short_for_a_hard_step_is_told(model):
    arguments = ProxConnectArguments("unused", hard_fraction=0.1, use_cpu=True, report_to="none")
    callback = MuCallback(model, lambda steps: MuSchedule("linear", 1.0, 3.0, steps=steps, hard_fraction=0.1))
    callback.on_train_begin(None, state(0, 4), TrainerControl())
    with pytest.warns(UserWarning, match=r"hard part \(hard_fraction, now 0\.1, which of 4 steps is none\)"):
        callback.on_train_end(arguments, state(4, 4), TrainerControl())


@pytest.mark.parametrize(
    ("stopped", "fraction", "advice"),
    [
        (6, 0.2, r"hard part begins at step 8 of 10, and training stopped at 6: let it get there, with more patience"),
        (10, 0.2, r"No step of the hard part had a better score, which is that of the packed model: .*now 0\.2"),
        (10, 0.0, r"Give the training a hard part \(hard_fraction, now 0\), or a larger mu_end"),
    ],
    ids=["stopped early", "to the end", "no hard part"],
)
def test_what_is_said_belongs_to_the_model_that_is_loaded(model, stopped, fraction, advice):
    """The best one is of step 4: saved after its fourth step, the one with the number 3."""
    callback = MuCallback(model, lambda steps: MuSchedule("linear", 1.0, 8.0, steps, hard_fraction=fraction))
    callback.on_train_begin(None, state(0), TrainerControl())
    callback.on_step_begin(None, state(3), TrainerControl())
    of_the_best = seen(model)
    callback.on_step_begin(None, state(stopped - 1), TrainerControl())
    callback.went_back(4)
    assert seen(model) == of_the_best
    with pytest.warns(UserWarning, match=rf"The best model, of step 4, is soft, at mu = [\d.]+: .*{advice}"):
        callback.on_train_end(None, state(stopped), TrainerControl())
    callback.on_train_begin(None, state(0), TrainerControl())
    assert callback.best is None


def test_any_trainer_hardens_with_it(tmp_path, crops):
    """The control: without it a Trainer of transformers trains at the first mu to the end, and `pack` says so."""
    data = [{"pixel_values": picture, "labels": i % LABELS} for i, picture in enumerate(crops(4, SIDE))]
    options = dict(max_steps=10, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
    for hardens in (True, False):
        latent = proxbit.binarize(ViTForImageClassification(vit(num_hidden_layers=1)))
        callbacks = [MuCallback(latent)] if hardens else []
        Trainer(latent, TrainingArguments(str(tmp_path), **options), train_dataset=data, callbacks=callbacks).train()
        assert seen(latent) == ({(30.0, True)} if hardens else {(0.3, False)})
        assert {layer.trained_soft for _, layer in latent_layers(latent)} == {not hardens}


@pytest.mark.parametrize(
    ("pair", "kind", "larger"),
    [
        ("bnn++", "linear", True),
        ("bnn++", "constant", False),
        ("proxquant", "linear", False),
        ("rpc", "linear", False),
    ],
)
def test_a_larger_mu_is_advised_where_it_does_no_harm(pair, kind, larger, recwarn):
    """`proxquant` and `rpc` pull weights by up to mu at every step, whatever the learning rate. A constant mu has no
    other end.
    """
    latent = proxbit.binarize(nn.Sequential(nn.Linear(5, 4)), BinarizationConfig(weights=pair, include=["*"]))
    callback = MuCallback(latent, lambda steps: MuSchedule(kind, 0.01, 0.01, steps=steps))
    callback.on_train_begin(None, state(2), TrainerControl())
    arguments = ProxConnectArguments("unused", hard_fraction=0.0, use_cpu=True, report_to="none")
    callback.on_train_end(arguments, state(2), TrainerControl())
    (warning,) = [str(each.message) for each in recwarn if "ended soft" in str(each.message)]
    assert ("larger mu_end" in warning) is larger and "hard_fraction" in warning


def test_scores_are_those_of_the_state_that_a_run_resumes_from():
    scores = {"a": 0.1, "b": 1 / 3}
    begun = TrainerState(stateful_callbacks=[LayerScores(scores)])
    assert begun.stateful_callbacks["LayerScores"]["args"] == {"scores": scores}
    callback = LayerScores({"of this run": 1.0})
    for step, expected in ((0, {"of this run": 1.0}), (3, scores)):
        begun.global_step = step
        callback.on_train_begin(None, begun, TrainerControl())
        assert callback.scores == expected
    callback.scores = scores
    callback.on_train_begin(None, state(3), TrainerControl())
    assert callback.scores == {}
