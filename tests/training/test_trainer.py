"""`ProxConnectTrainer`: what it refuses, its parameter groups, the way of mu, its logs and evaluations."""

import copy
import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTForImageClassification,
    default_data_collator,
)
from transformers.trainer_utils import HPSearchBackend

import proxbit
from proxbit.config import BinarizationConfig
from proxbit.errors import ConfigError, LatentError, ModelStateError, MuRangeError
from proxbit.nn import latent_layers, set_mu
from proxbit.training import DistillationArguments, ProxConnectArguments, ProxConnectCallback, ProxConnectTrainer
from proxbit.training.checkpoints import MANIFEST
from proxbit.training.metrics import classification_metrics
from tiny_models import LABELS, SIDE, vit


def make(pair="bnn++", seed=1, **changes):
    torch.manual_seed(seed)
    model = ViTForImageClassification(vit())
    nn.init.normal_(model.classifier.weight)
    return proxbit.binarize(model, BinarizationConfig(weights=pair, **changes))


def examples(crops, count):
    return [{"pixel_values": image, "labels": i % LABELS} for i, image in enumerate(crops(count, SIDE))]


def arguments(folder, **changes):
    fixed = dict(report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no")
    training = dict(per_device_train_batch_size=4, max_steps=10, learning_rate=1e-2)
    return ProxConnectArguments(str(folder), **(fixed | training | changes))


def prepare(folder, model, crops, callbacks=None, **changes):
    return ProxConnectTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=examples(crops, 8),
        eval_dataset=examples(crops, 12),
        callbacks=callbacks,
        compute_metrics=classification_metrics,
    )


def latents(model):
    return {name: layer.weight.detach().clone() for name, layer in latent_layers(model)}


class Recorder(TrainerCallback):
    """What the model is like inside every optimizer step, and its latents after it."""

    def __init__(self):
        self.mu, self.hard, self.rates, self.latents = [], [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.latents.append(latents(model))

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        layers = [layer for _, layer in latent_layers(model)]
        assert len({(float(layer.mu), layer.hardened) for layer in layers}) == 1
        self.mu.append(float(layers[0].mu))
        self.hard.append(layers[0].hardened)
        self.rates.append(optimizer.param_groups[-1]["lr"])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.latents.append(latents(model))


# --- what it refuses


@pytest.mark.parametrize(
    "convert, words",
    [
        (proxbit.dequantize, r"this one is float. Call proxbit.binarize\(model, config\) first"),
        (proxbit.pack, "this one is packed. A packed model cannot be trained; load its latent checkpoint instead"),
    ],
    ids=["float", "packed"],
)
def test_only_latent_models_are_trained(tmp_path, convert, words):
    with pytest.raises(ModelStateError, match=words):
        ProxConnectTrainer(model=convert(make()), args=arguments(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value, words", [(float("nan"), "NaN or infinite"), (0.0, "all zero")], ids=["nan", "zero"])
def test_latents_that_cannot_be_binarized_are_refused(tmp_path, value, words):
    model = make()
    name, layer = list(latent_layers(model))[1]
    with torch.no_grad():
        layer.weight[2] = value
    with pytest.raises(LatentError, match=f"{name}.weight: 1 of .* {words}.*row 2"):
        ProxConnectTrainer(model=model, args=arguments(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [{}, dict(model=nn.Linear(2, 2), model_init=make)], ids=["neither", "both"])
def test_a_model_or_what_makes_one_is_needed(tmp_path, given):
    with pytest.raises(ConfigError, match="needs a model, or model_init, which makes one: one of the two"):
        ProxConnectTrainer(args=arguments(tmp_path), **given)


def test_a_teacher_with_other_labels_is_refused(tmp_path):
    teacher = ViTForImageClassification(vit(num_labels=7))
    with pytest.raises(ConfigError, match="The teacher has 7 labels, the model 3"):
        ProxConnectTrainer(model=make(), args=arguments(tmp_path), teacher=teacher)


@pytest.mark.parametrize(
    "pair, changes, words",
    [
        ("parq", dict(mu_start=0.5), "mu = 0.5 is out of range: this pair takes finite values from 1 to inf"),
        ("bnn++", dict(mu_schedule="linear", mu_end=-3.0), "mu = -3.0 is out of range"),
        ("bnn++", dict(mu_start=0.0), "'log' needs mu > 0"),
        ("pc", dict(mu_end=float("inf")), "mu must be finite"),
    ],
    ids=["below the start", "below the end", "log of zero", "infinite"],
)
def test_mu_out_of_range_is_refused_before_the_first_step(tmp_path, crops, pair, changes, words):
    model, recorder = make(pair), Recorder()
    before = copy.deepcopy(model.state_dict())
    trainer = prepare(tmp_path, model, crops, [recorder], **changes)
    with pytest.raises(MuRangeError, match=words):
        trainer.train()
    assert recorder.mu == []
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_aggregate_needs_a_learning_rate_known_beforehand(tmp_path, crops):
    changes = dict(mu_schedule="aggregate", lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")
    with pytest.raises(MuRangeError, match="'aggregate' needs a learning rate that is a function of the step"):
        prepare(tmp_path, make("parq"), crops, **changes).train()


@pytest.mark.parametrize("pair", ["proxquant", "rpc"])
def test_aggregate_is_refused_for_pairs_that_apply_their_map_anew(tmp_path, crops, pair):
    """Before the first step."""
    model, recorder = make(pair), Recorder()
    before = latents(model)
    with pytest.raises(ConfigError, match="'aggregate' it never learns. Leave mu_schedule"):
        prepare(tmp_path, model, crops, [recorder], mu_schedule="aggregate").train()
    assert recorder.mu == []
    assert all(torch.equal(before[name], weight) for name, weight in latents(model).items())


@pytest.mark.parametrize(
    ("pair", "changes", "words"),
    [
        ("bireal", dict(mu_end=30.0), r"'constant' .* stays at 1: mu_end=30 would do nothing"),
        ("bnn++", dict(mu_schedule="constant", mu_start=2.0, mu_end=30.0), "stays at 2: mu_end=30 would do nothing"),
        ("parq", dict(mu_schedule="aggregate", mu_start=2.0), "'aggregate' .* mu_start and mu_end would do nothing"),
        ("parq", dict(mu_schedule="aggregate", mu_end=2.0), "'aggregate' .* mu_start and mu_end would do nothing"),
    ],
)
def test_a_mu_that_would_do_nothing_is_refused(tmp_path, crops, pair, changes, words):
    model, recorder = make(pair), Recorder()
    with pytest.raises(ConfigError, match=f"{words}. .* set mu_schedule to linear, log or sigmoid"):
        prepare(tmp_path, model, crops, [recorder], **changes).train()
    assert recorder.mu == []


@pytest.mark.parametrize("end", [None, 2.0])
def test_a_constant_mu_ends_where_it_starts(tmp_path, crops, end):
    """In the record of the run too, whatever the end that the pair has."""
    trainer = prepare(tmp_path, make(), crops, max_steps=1, mu_schedule="constant", mu_start=2.0, mu_end=end)
    trainer.train()
    told = trainer.run_record()["arguments"]
    assert (told["mu_schedule"], told["mu_start"], told["mu_end"]) == ("constant", 2.0, 2.0)


# --- as the Trainer of transformers


def test_arguments_of_transformers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"args are TrainingArguments: .* takes ProxConnectArguments of"):
        ProxConnectTrainer(make(), TrainingArguments(str(tmp_path / "out"), use_cpu=True))
    with pytest.raises(ConfigError, match="args are DistillationArguments"):
        ProxConnectTrainer(make(), DistillationArguments(str(tmp_path / "out"), use_cpu=True))
    assert list(tmp_path.iterdir()) == []


def test_arguments_by_position_are_those_of_transformers(tmp_path, crops):
    given = inspect.signature(Trainer.__init__).parameters
    assert list(inspect.signature(ProxConnectTrainer.__init__).parameters)[:8] == list(given)[:8]
    data, own = examples(crops, 4), default_data_collator
    order = ["model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class", "model_init"]
    assert list(given)[1:10] == [*order, "compute_loss_func", "compute_metrics"]
    values = (make(), arguments(tmp_path), own, data, data[:2], None, None, None, classification_metrics)
    trainer = ProxConnectTrainer(*values)
    assert (trainer.data_collator, trainer.train_dataset, trainer.eval_dataset) == (own, data, data[:2])
    assert trainer.compute_metrics is classification_metrics


def small(recipe=None):
    torch.manual_seed(1)
    model = ViTForImageClassification(vit(num_hidden_layers=1))
    return model if recipe else proxbit.binarize(model)


@pytest.mark.parametrize("recipe", [None, "w1a1"])
def test_model_init_makes_a_model_for_each_training(tmp_path, crops, recipe):
    """A float one is made latent by the recipe. mu, flips and the record follow the new one."""
    recorder, made, logs = Recorder(), [], dict(logging_strategy="steps", logging_steps=4)

    def init():
        made.append(small(recipe))
        return made[-1]

    trainer = ProxConnectTrainer(
        args=arguments(tmp_path, recipe=recipe, max_steps=4, hard_fraction=0.25, **logs),
        train_dataset=examples(crops, 8),
        model_init=init,
        callbacks=[recorder],
    )
    ends = []
    for _ in range(2):
        trainer.train()
        ends.append((trainer.model, latents(trainer.model), trainer.state.log_history[-2]["flip_ratio"]))
    assert len(made) == 3 and ends[0][0] is made[1] and ends[1][0] is made[2]
    assert all(torch.equal(ends[0][1][name], weight) for name, weight in ends[1][1].items())
    assert ends[0][2] == ends[1][2] > 0
    assert recorder.mu[:4] == recorder.mu[4:] and recorder.hard == [False, False, False, True] * 2
    assert sum(isinstance(each, ProxConnectCallback) for each in trainer.callback_handler.callbacks) == 1


def test_a_search_of_hyperparameters_trains_each_trial_anew(tmp_path, crops, monkeypatch):
    """The search itself is optuna's or ray's; a trial of it is played here."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer = ProxConnectTrainer(
        args=arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3),
        train_dataset=examples(crops, 4),
        eval_dataset=examples(crops, 4),
        model_init=lambda: small(),
    )
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    trainer.hp_space = lambda trial: trial.params
    for number, factor in enumerate((0.5, 2.0)):
        trainer.train(trial=SimpleNamespace(number=number, params={"latent_learning_rate_factor": factor}))
        rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
        assert rates[-1] == pytest.approx(1e-2 * factor) and rates[0] == 1e-2
        assert (tmp_path / f"run-{number}" / "checkpoint-3" / MANIFEST).is_file()


def test_a_teacher_is_compared_with_what_model_init_makes(tmp_path):
    teacher = ViTForImageClassification(vit(num_labels=7, num_hidden_layers=1))
    with pytest.raises(ConfigError, match="The teacher has 7 labels, the model 3"):
        ProxConnectTrainer(args=arguments(tmp_path), model_init=lambda: small(), teacher=teacher)


# --- parameter groups


def test_latents_are_a_last_group(tmp_path, crops):
    model = make()
    trainer = prepare(tmp_path, model, crops, weight_decay=0.1, learning_rate=2e-3, latent_learning_rate_factor=2.5)
    *others, last = trainer.create_optimizer().param_groups
    assert {id(p) for p in last["params"]} == {id(layer.weight) for _, layer in latent_layers(model)}
    assert (last["weight_decay"], last["lr"]) == (0, pytest.approx(5e-3))
    assert {group["weight_decay"] for group in others} == {0.0, 0.1}
    assert {group["lr"] for group in others} == {2e-3}
    assert trainer.create_optimizer() is trainer.optimizer


def test_every_trainable_parameter_is_in_one_group(tmp_path, crops):
    model = make()
    model.classifier.weight.requires_grad_(False)
    frozen = next(layer for _, layer in latent_layers(model))
    frozen.weight.requires_grad_(False)
    groups = prepare(tmp_path, model, crops, weight_decay=0.1).create_optimizer().param_groups
    given = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert id(frozen.weight) not in given


def test_the_head_decays_and_latents_do_not(tmp_path, crops):
    """With all gradients zero, only decay moves weights."""
    model = make()
    trainer = prepare(tmp_path, model, crops, weight_decay=0.1, latent_learning_rate_factor=3.0)
    optimizer = trainer.create_optimizer()
    before, head = latents(model), model.classifier.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in latents(model).items())
    torch.testing.assert_close(model.classifier.weight.detach(), head * (1 - 1e-2 * 0.1))


# --- the way of mu


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("log", lambda p: 0.5 * 16**p),
        ("linear", lambda p: 0.5 + 7.5 * p),
        ("sigmoid", lambda p: 1 / (1 / 8 + (2 - 1 / 8) * (1 - np.tanh(5 * p - 2.5) / np.tanh(2.5)) / 2)),
        ("constant", lambda p: 0.5),
    ],
    ids=["log", "linear", "sigmoid", "constant"],
)
def test_mu_follows_its_schedule(tmp_path, crops, schedule, expected):
    """Ten steps, the last three hard: the first seven go from the start to the end, the others stay there."""
    recorder, model = Recorder(), make()
    end = None if schedule == "constant" else 8.0
    changes = dict(mu_schedule=schedule, mu_start=0.5, mu_end=end, hard_fraction=0.3)
    prepare(tmp_path, model, crops, [recorder], **changes).train()
    assert recorder.mu == pytest.approx([expected(min(1, step / 6)) for step in range(10)])
    assert recorder.hard == [False] * 7 + [True] * 3
    assert all(layer.hardened for _, layer in latent_layers(model))


def test_the_defaults_are_those_of_the_pair(tmp_path, crops):
    """BNN++ goes from 0.3 to 30, logarithmically; the last tenth of the steps is hard."""
    recorder = Recorder()
    prepare(tmp_path, make(), crops, [recorder]).train()
    assert recorder.mu == pytest.approx([0.3 * 100 ** min(1, step / 8) for step in range(10)])
    assert recorder.hard == [False] * 9 + [True]


@pytest.mark.parametrize("kind", ["cosine", "constant_with_warmup"])
def test_aggregate_sums_the_learning_rates_of_the_latents(tmp_path, crops, kind):
    recorder = Recorder()
    changes = dict(mu_schedule="aggregate", lr_scheduler_type=kind, warmup_steps=3, latent_learning_rate_factor=2.0)
    prepare(tmp_path, make("parq"), crops, [recorder], **changes).train()
    assert max(recorder.rates) == pytest.approx(2e-2)
    assert len(set(recorder.rates)) > 3
    assert recorder.mu == pytest.approx([1 + sum(recorder.rates[:step]) for step in range(10)], rel=1e-9)


def test_a_pair_may_have_aggregate_as_its_default(tmp_path, crops):
    recorder, model = Recorder(), make("parq")
    for _, layer in latent_layers(model):
        layer.pair = replace(layer.pair, schedule=("aggregate", 1.0, 1.0))
    prepare(tmp_path, model, crops, [recorder]).train()
    assert recorder.mu == pytest.approx([1 + sum(recorder.rates[:step]) for step in range(10)], rel=1e-9)


def test_accumulated_batches_share_one_mu(tmp_path, crops):
    recorder = Recorder()
    changes = dict(mu_schedule="linear", mu_start=1.0, mu_end=3.0, hard_fraction=0, max_steps=3)
    prepare(tmp_path, make(), crops, [recorder], gradient_accumulation_steps=4, **changes).train()
    assert recorder.mu == pytest.approx([1, 2, 3])
    assert recorder.hard == [False] * 3


def test_a_training_begins_its_schedule_anew(tmp_path, crops):
    """Of what was done with the model before, such as a search for a learning rate, only its weights are left."""
    model, recorder = small(), Recorder()
    prepare(tmp_path, model, crops, max_steps=5, hard_fraction=0.2, activations_first=0.4).train()
    assert {(float(layer.mu), layer.hardened) for _, layer in latent_layers(model)} == {(30.0, True)}
    prepare(tmp_path, model, crops, [recorder], max_steps=4, hard_fraction=0.25).train()
    assert recorder.mu == pytest.approx([0.3, 3.0, 30.0, 30.0])
    assert recorder.hard == [False, False, False, True]


def test_the_model_that_is_loaded_in_the_end_has_its_own_mu(tmp_path, crops):
    """Stopped early; scripted scores, hard and soft in turn. An evaluation afterwards is the one of then."""
    scores = iter([0.1, 0.1, 0.9, 0.9, 0.3, 0.3, 0.2, 0.2, 0.9, 0.9])
    strategy = dict(eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2, max_steps=40)
    trainer = ProxConnectTrainer(
        small(),
        arguments(tmp_path, **strategy, load_best_model_at_end=True, metric_for_best_model="score"),
        None,
        examples(crops, 8),
        examples(crops, 12),
        compute_metrics=lambda prediction: {"score": next(scores)},
        callbacks=[EarlyStoppingCallback(2)],
    )
    with pytest.warns(UserWarning, match="The best model, of step 4, is soft.*begins at step 36 of 40"):
        trainer.train()
    assert (trainer.state.global_step, trainer.state.best_global_step) == (8, 4)
    expected = 0.3 * 100 ** (3 / 35)
    assert [float(layer.mu) for _, layer in latent_layers(trainer.model)] == [pytest.approx(expected)] * 6
    then = next(each for each in trainer.state.log_history if each.get("step") == 4 and "eval_loss" in each)
    now = trainer.evaluate()
    assert now["eval_loss"] == pytest.approx(then["eval_loss"], abs=1e-6)
    assert now["eval_soft_loss"] == pytest.approx(then["eval_soft_loss"], abs=1e-6)


# --- logs and evaluation


def gap(weights, mu):
    """The distance of a SS_mu(W / s) from the hard weights over the size of these, with s the mean |W| of a row and a
    the least-squares scale.
    """
    distance = size = 0.0
    for weight in weights.values():
        weight = weight.double().numpy()
        mean = np.abs(weight).mean(1, keepdims=True)
        x = mu * weight / mean
        logistic = 1 / (1 + np.exp(-x))
        soft = 2 * logistic * (1 + x * (1 - logistic)) - 1
        soft *= (soft * weight).sum(1, keepdims=True) / (soft * soft).sum(1, keepdims=True)
        distance += np.abs(soft - np.where(weight >= 0, mean, -mean)).sum()
        size += np.abs(weight).sum()
    return distance / size


def test_logs_hold_mu_flips_and_gap(tmp_path, crops):
    """Every two of ten steps; the last three are hard."""
    recorder = Recorder()
    changes = dict(logging_strategy="steps", logging_steps=2, hard_fraction=0.3, learning_rate=0.05)
    trainer = prepare(tmp_path, make(), crops, [recorder], **changes)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4, 6, 8, 10]
    for entry in logs:
        step = entry["step"]
        before, after = recorder.latents[step - 2], recorder.latents[step]
        flips = sum(int(((before[name] >= 0) != (after[name] >= 0)).sum()) for name in before)
        assert entry["mu"] == pytest.approx(recorder.mu[step - 1])
        assert entry["flip_ratio"] == pytest.approx(flips / sum(value.numel() for value in before.values()))
        assert entry["hardening_gap"] == pytest.approx(0 if step > 7 else gap(after, recorder.mu[step - 1]), rel=1e-4)
    assert min(entry["flip_ratio"] for entry in logs[:3]) > 0


def measured(logits, labels):
    """Loss, accuracy and balanced accuracy, from their definitions."""
    right = (logits.argmax(1) == labels).double()
    recall = torch.stack([right[labels == label].mean() for label in range(LABELS)])
    loss = -logits.double().log_softmax(1)[torch.arange(len(labels)), labels].mean()
    return {"loss": float(loss), "accuracy": float(right.mean()), "balanced_accuracy": float(recall.mean())}


@pytest.mark.parametrize(("prefix", "hardened"), [("eval", False), ("test", True)], ids=["evaluate", "predict"])
def test_evaluation_is_of_what_ships(tmp_path, crops, prefix, hardened):
    """Soft values are those of training mode (this model has no dropout), and those of F_mu once training is hard."""
    model, images, labels = make(), crops(12, SIDE), torch.arange(12) % LABELS
    set_mu(model, 0.3)
    with torch.no_grad():
        soft = measured(model.train()(images).logits, labels)
        hard = measured(proxbit.pack(copy.deepcopy(model)).eval()(images).logits, labels)
    set_mu(model, 0.3, hard=hardened)
    trainer = prepare(tmp_path, model, crops)
    found = trainer.evaluate() if prefix == "eval" else trainer.predict(examples(crops, 12)).metrics
    assert abs(soft["loss"] - hard["loss"]) > 0.01
    for name, value in hard.items():
        assert found[f"{prefix}_{name}"] == pytest.approx(value, abs=1e-5)
        assert found[f"{prefix}_soft_{name}"] == pytest.approx(soft[name], abs=1e-5)
        assert found[f"{prefix}_gap_{name}"] == pytest.approx(soft[name] - value, abs=1e-5)
    assert not any(layer.soft_eval for _, layer in latent_layers(model))
