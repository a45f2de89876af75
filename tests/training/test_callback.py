"""The callback of the step: mu from the number of the step alone, where an update starts, and how a run ends."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments, ViTForImageClassification

import proxbit
from proxbit import training
from proxbit.config import BinarizationConfig
from proxbit.errors import MuRangeError
from proxbit.nn import latent_layers
from proxbit.quantizers import MuSchedule
from proxbit.training import LayerScores, ProxConnectArguments, ProxConnectCallback, ProxConnectTrainer
from tiny_models import LABELS, SIDE, vit

RATE, STEPS = 0.5, 3
# mu from 1 to 8 in the 8 soft steps of 10.
LINEAR = dict(mu_schedule="linear", mu_start=1.0, mu_end=8.0, hard_fraction=0.2)


@pytest.fixture
def model():
    return latent("bnn++")


def latent(pair):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    return proxbit.binarize(layers, BinarizationConfig(weights=pair, include=["*"]))


class Run:
    """A callback in the place where a Trainer has it."""

    def __init__(self, folder, model, callback, steps=10):
        self.args = TrainingArguments(str(folder), use_cpu=True, report_to="none", logging_strategy="no")
        Accelerator(cpu=True)  # as a Trainer sets it up
        self.model, self.callback, self.steps = model, callback, steps

    def tell(self, event, step, **state):
        found = TrainerState(global_step=step, max_steps=self.steps, **state)
        return getattr(self.callback, event)(self.args, found, TrainerControl(), model=self.model)


@pytest.fixture
def run(tmp_path, model):
    return Run(tmp_path, model, ProxConnectCallback(**LINEAR))


def seen(model):
    return {(float(layer.mu), layer.hardened) for _, layer in latent_layers(model)}


def test_every_step_has_its_mu(run, model):
    run.tell("on_train_begin", 0)
    for step in range(10):
        run.tell("on_step_begin", step)
        assert seen(model) == {(min(step + 1.0, 8.0), step >= 8)}


def test_a_training_begins_or_resumes_where_it_stands(run, model):
    """Before the first step already: an evaluation may come first. Steps may then come in any order. The next training
    has as many steps as it says.
    """
    run.tell("on_train_begin", 9)
    assert seen(model) == {(8.0, True)}
    run.tell("on_step_begin", 2)
    assert seen(model) == {(3.0, False)}
    run.steps = 40
    run.tell("on_train_begin", 0)
    run.tell("on_step_begin", 31)
    assert seen(model) == {(8.0, False)}


def test_a_run_that_stopped_in_a_stage_leaves_nothing_waiting(tmp_path, model):
    """The next one of the same model has its own stages, or none; one that resumes has those of its step."""
    halves = Run(tmp_path, model, ProxConnectCallback(**LINEAR, activations_first=0.5))
    layers = [layer for _, layer in latent_layers(model)]
    halves.tell("on_train_begin", 0)
    halves.tell("on_step_begin", 3)
    assert all(layer.waits == {"weight"} for layer in layers)
    Run(tmp_path, model, ProxConnectCallback(**LINEAR)).tell("on_train_begin", 0)
    assert all(layer.waits == set() for layer in layers)
    for step, waits in ((3, {"weight"}), (5, set())):
        halves.tell("on_train_begin", step)
        assert all(layer.waits == waits for layer in layers)


def test_a_mu_out_of_range_changes_nothing(tmp_path, model):
    before = seen(model)
    callback = ProxConnectCallback(mu_schedule="constant", mu_start=-1.0)
    with pytest.raises(MuRangeError, match="mu = -1"):
        Run(tmp_path, model, callback).tell("on_train_begin", 0)
    assert seen(model) == before


@pytest.mark.parametrize(("pair", "moves"), [("proxquant", True), ("rpc", True), ("pc", False), ("bnn++", False)])
def test_only_pairs_that_say_so_start_elsewhere(tmp_path, pair, moves):
    """The callback moves the latents of proxquant, before the step of the optimizer, and of no other pair."""
    model = latent(pair)
    run = Run(tmp_path, model, ProxConnectCallback(mu_schedule="constant", mu_start=0.3, hard_fraction=0.0))
    before = model[0].weight.detach().clone()
    run.tell("on_train_begin", 0)
    run.tell("on_step_begin", 0)
    assert torch.equal(model[0].weight, before)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    run.tell("on_pre_optimizer_step", 0)
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
@pytest.mark.parametrize(("pair", "units"), [("proxquant", "raw"), ("proxquant", "rows"), ("rpc", "rows")])
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


def test_a_run_that_ends_soft_is_told(run, recwarn):
    """The gap and mu are in the warning; a run that ends hard has none."""
    run.tell("on_train_begin", 2)
    with pytest.warns(UserWarning, match=r"ended soft, at mu = 3: the hardening gap .* is 0\.\d+,.*at step 8 of 10"):
        run.tell("on_train_end", 2)
    recwarn.clear()
    run.tell("on_step_begin", 9)
    run.tell("on_train_end", 10)
    assert not list(recwarn)


def test_a_run_too_short_for_a_hard_step_is_told(tmp_path, model):
    run = Run(tmp_path, model, ProxConnectCallback(), steps=4)
    run.tell("on_train_begin", 0)
    with pytest.warns(UserWarning, match=r"hard part \(hard_fraction, now 0\.1, which of 4 steps is none\)"):
        run.tell("on_train_end", 4)


@pytest.mark.parametrize(
    ("stopped", "fraction", "advice"),
    [
        (6, 0.2, r"hard part begins at step 8 of 10, and training stopped at 6: let it get there, with more patience"),
        (10, 0.2, r"No step of the hard part had a better score, which is that of the packed model: .*now 0\.2"),
        (10, 0.0, r"Give the training a hard part \(hard_fraction, now 0\), or a larger mu_end"),
    ],
    ids=["stopped early", "to the end", "no hard part"],
)
def test_what_is_said_belongs_to_the_model_that_is_loaded(tmp_path, model, stopped, fraction, advice):
    """The best one is of step 4: saved after its fourth step, the one with the number 3."""
    run = Run(tmp_path, model, ProxConnectCallback(**LINEAR | {"hard_fraction": fraction}))
    run.args.load_best_model_at_end = True
    run.tell("on_train_begin", 0)
    run.tell("on_step_begin", 3)
    of_the_best = seen(model)
    run.tell("on_step_begin", stopped - 1)
    with pytest.warns(UserWarning, match=rf"The best model, of step 4, is soft, at mu = [\d.]+: .*{advice}"):
        run.tell("on_train_end", stopped, best_model_checkpoint=str(tmp_path), best_global_step=4)
    assert seen(model) == of_the_best
    run.tell("on_train_begin", 0)
    with pytest.warns(UserWarning, match="Training ended soft"):
        run.tell("on_train_end", 2)


@pytest.mark.parametrize(
    ("pair", "kind", "larger"),
    [("bnn++", "linear", True), ("bnn++", "constant", False), ("proxquant", "linear", False)],
)
def test_a_larger_mu_is_advised_where_it_does_no_harm(tmp_path, pair, kind, larger, recwarn):
    """`proxquant` and `rpc` pull weights by up to mu at every step, whatever the learning rate. A constant mu has no
    other end.
    """
    settings = dict(mu_schedule=kind, mu_start=0.01, mu_end=0.01, hard_fraction=0.0)
    run = Run(tmp_path, latent(pair), ProxConnectCallback(**settings))
    run.tell("on_train_begin", 2)
    run.tell("on_train_end", 2)
    (warning,) = [str(each.message) for each in recwarn if "ended soft" in str(each.message)]
    assert ("larger mu_end" in warning) is larger and "hard_fraction" in warning


def test_the_name_of_before_hardens_too(tmp_path, crops):
    """The control: without it a Trainer of transformers trains at the first mu to the end, and `pack` says so."""
    with pytest.warns(DeprecationWarning, match="MuCallback is deprecated: use ProxConnectCallback"):
        kind = training.MuCallback
    data = [{"pixel_values": image, "labels": i % LABELS} for i, image in enumerate(crops(4, SIDE))]
    options = dict(max_steps=4, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)

    def begin(steps):
        return MuSchedule("constant", 2.0, 2.0, steps=steps, hard_fraction=0.5)

    for arguments, end in (((), (30.0, False)), ((begin,), (2.0, True)), (None, (0.3, False))):
        model = proxbit.binarize(ViTForImageClassification(vit(num_hidden_layers=1)))
        callbacks = [] if arguments is None else [kind(model, *arguments)]
        Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=data, callbacks=callbacks).train()
        assert seen(model) == {end}
        assert {layer.trained_soft for _, layer in latent_layers(model)} == {not end[1]}


def test_scores_are_those_of_the_state_that_a_run_resumes_from():
    scores = {"a": 0.1, "b": 1 / 3}
    begun = TrainerState(stateful_callbacks=[LayerScores(scores)])
    assert begun.stateful_callbacks["LayerScores"]["args"] == {"scores": scores}
    callback = LayerScores({"of this run": 1.0})
    for step, expected in ((0, {"of this run": 1.0}), (3, scores)):
        begun.global_step = step
        callback.on_train_begin(None, begun, TrainerControl())
        assert callback.scores == expected
    callback.on_train_begin(None, TrainerState(global_step=3), TrainerControl())
    assert callback.scores == {}
