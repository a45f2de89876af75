"""Checkpoints of a run: latent, reloadable, the best of them, and resumed as if training had never stopped."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTForImageClassification,
)

import proxbit
from proxbit.config import BinarizationConfig
from proxbit.errors import ConfigError
from proxbit.nn import latent_layers
from proxbit.patching import state_of
from proxbit.plugin.loading import load_weights
from proxbit.training import (
    DistillationArguments,
    DistillationTrainer,
    LayerScores,
    ProxConnectArguments,
    ProxConnectTrainer,
)
from proxbit.training.checkpoints import MANIFEST
from tiny_models import LABELS, SIDE, vit

HALF = 5


def vit_with_dropout():
    return ViTForImageClassification(vit(hidden_dropout_prob=0.1))


def clip_with_dropout():
    config = vit().to_dict()
    sizes = {name: config[name] for name in ("image_size", "patch_size", "hidden_size", "intermediate_size")}
    sizes |= dict(num_hidden_layers=2, num_attention_heads=4, attention_dropout=0.1)
    return CLIPForImageClassification(CLIPConfig(vision_config=sizes, num_labels=LABELS))


# The names of CLIP's weights are the same in memory and on disk, those of ViT are not. The Trainer of transformers 5
# loses renamed weights when it resumes, of float models too: the control arm is without them.
FAMILIES = {"vit": vit_with_dropout, "clip": clip_with_dropout}


def make(seed, family="vit", latent=True):
    """Dropout is on: resuming must restore the state of the random numbers too."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    nn.init.normal_(model.classifier.weight)
    return proxbit.binarize(model, BinarizationConfig()) if latent else model


def examples(crops, count):
    return [{"pixel_values": image, "labels": i % LABELS} for i, image in enumerate(crops(count, SIDE))]


def settings(folder, **changes):
    fixed = dict(report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="steps", save_steps=HALF)
    training = dict(per_device_train_batch_size=4, max_steps=2 * HALF, learning_rate=1e-2, logging_steps=1)
    return dict(output_dir=str(folder)) | fixed | training | changes


def same(first, second):
    """Bit for bit."""
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


class Stop(TrainerCallback):
    """Stops training after `HALF` steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == HALF


def proxconnect(folder, model, data, **kwargs):
    """The second half begins soft and ends hard."""
    args = ProxConnectArguments(**settings(folder, hard_fraction=0.3, weight_decay=0.1))
    return ProxConnectTrainer(model=model, args=args, train_dataset=data, **kwargs)


def progressive(folder, model, data, restore=False, **kwargs):
    """The least sensitive layers first; at the stop, some of them still wait."""
    changes = dict(progression="taylor", activations_first=0.4, restore_callback_states_from_checkpoint=restore)
    args = ProxConnectArguments(**settings(folder, hard_fraction=0.3, **changes))
    return ProxConnectTrainer(model=model, args=args, train_dataset=data, **kwargs)


def distilled(folder, model, data, **kwargs):
    return proxconnect(folder, model, data, teacher=make(9, latent=False), **kwargs)


def distilled_float(folder, model, data, **kwargs):
    args = DistillationArguments(**settings(folder))
    teacher = make(9, latent=False)
    return DistillationTrainer(model=model, args=args, train_dataset=data, teacher=teacher, **kwargs)


def plain(folder, model, data, **kwargs):
    """The control: the Trainer of transformers on the float model."""
    return Trainer(model=model, args=TrainingArguments(**settings(folder)), train_dataset=data, **kwargs)


def curve(trainer):
    """The numbers that were logged at every step, without the times."""
    names = ("step", "loss", "grad_norm", "learning_rate", "mu", "hardening_gap", "flip_ratio")
    return [{k: entry[k] for k in names if k in entry} for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "build, family, latent",
    [
        (proxconnect, "vit", True),
        (proxconnect, "clip", True),
        (progressive, "vit", True),
        (distilled, "vit", True),
        (distilled_float, "vit", False),
        (plain, "clip", False),
    ],
    ids=["vit", "clip", "vit layer by layer", "vit with teacher", "float vit with teacher", "control"],
)
def test_resuming_is_as_if_training_had_not_stopped(tmp_path, crops, build, family, latent):
    """Eleven images in batches of four: the stop falls inside an epoch. The control is the plain Trainer on the
    float model.
    """
    data = examples(crops, 11)
    whole = build(tmp_path / "whole", make(1, family, latent), data)
    whole.train()

    first = build(tmp_path / "parts", make(1, family, latent), data, callbacks=[Stop()])
    first.train()
    assert first.state.global_step == HALF
    assert not same(first.model, whole.model)

    rest = build(tmp_path / "parts", make(2, family, latent), data)
    rest.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{HALF}"))
    assert same(rest.model, whole.model)
    assert curve(rest) == curve(whole)
    assert [entry["step"] for entry in curve(rest)] == list(range(1, 2 * HALF + 1))
    kept = [trainer.optimizer.state_dict()["state"] for trainer in (rest, whole)]
    assert all(torch.equal(kept[0][i][name], value) for i in kept[1] for name, value in kept[1][i].items())


def test_a_resumed_run_keeps_the_order_it_began_with(tmp_path, crops):
    """The control: taken anew where the run stopped, the order is another one."""
    data = examples(crops, 8)
    progressive(tmp_path, make(1), data, callbacks=[Stop()]).train()
    file = tmp_path / f"checkpoint-{HALF}" / "trainer_state.json"
    kept = json.loads(file.read_text())["stateful_callbacks"]["LayerScores"]["args"]["scores"]
    order = sorted(kept, key=kept.get)
    waiting = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            waiting.append([name for name, layer in latent_layers(model) if layer.waits])

    trainer = progressive(tmp_path, make(2), data, restore=True, callbacks=[Watch()])
    trainer.train(resume_from_checkpoint=True)
    assert 0 < len(waiting[0]) < len(order) and set(waiting[0]) == set(order[-len(waiting[0]) :])
    last = tmp_path / f"checkpoint-{2 * HALF}" / "trainer_state.json"
    assert json.loads(last.read_text())["stateful_callbacks"]["LayerScores"]["args"]["scores"] == kept

    anew = progressive(tmp_path, AutoModelForImageClassification.from_pretrained(file.parent), data)
    anew._score()
    scores = next(each.scores for each in anew.callback_handler.callbacks if isinstance(each, LayerScores))
    assert sorted(scores, key=scores.get) != order

    file.write_text(file.read_text().replace("LayerScores", "OfAnotherRun"))
    (file.parent / MANIFEST).unlink()  # it knows another file
    with pytest.raises(ConfigError, match="can be resumed from checkpoints of a run with this progression only"):
        progressive(tmp_path, make(2), data).train(resume_from_checkpoint=str(file.parent))


def test_what_a_resumed_run_has_learned_is_not_calibrated_over(tmp_path, crops):
    """By the next training of the same model: it begins with the weights that the last one ended with."""
    data, ends = examples(crops, 8), []

    class Keep(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            ends.append(copy.deepcopy(model))

    def signs(seed, callback):
        model = proxbit.binarize(make(seed, latent=False), BinarizationConfig(activations="sign"))
        return proxconnect(tmp_path, model, data, callbacks=[callback])

    signs(1, Stop()).train()
    trainer = signs(2, Keep())
    trainer.train(resume_from_checkpoint=True)
    ends.append(copy.deepcopy(trainer.model))
    trainer.train()
    assert not same(ends[0], ends[1]) and same(ends[1], ends[2])


def test_a_resumed_run_has_the_mu_of_its_step(tmp_path, crops):
    data = examples(crops, 8)
    proxconnect(tmp_path, make(1), data, callbacks=[Stop()]).train()
    trainer = proxconnect(tmp_path, make(2), data)
    trainer.train(resume_from_checkpoint=True)
    mus = [entry["mu"] for entry in curve(trainer)]
    assert mus == pytest.approx([0.3 * 100 ** min(1, step / 6) for step in range(10)])


@pytest.mark.parametrize("stop", [2 * HALF, HALF], ids=["complete", "past a smaller max_steps"])
def test_a_run_that_is_done_does_no_step_more(tmp_path, crops, stop):
    """Its last step is inside an epoch. Packed, it is the same to the last bit, however often it is resumed."""
    data = examples(crops, 11)
    args = ProxConnectArguments(**settings(tmp_path, hard_fraction=0.3))
    first = ProxConnectTrainer(make(1), args, train_dataset=data)
    first.train()
    packed = proxbit.pack(copy.deepcopy(first.model))
    for _ in range(2):
        args.max_steps = stop
        again = ProxConnectTrainer(make(2), args, train_dataset=data)
        assert again.train(resume_from_checkpoint=True).global_step == 2 * HALF
        assert same(again.model, first.model) and same(proxbit.pack(again.model), packed)


def test_checkpoints_are_latent_and_reload(tmp_path, crops):
    trainer = proxconnect(tmp_path, make(1), examples(crops, 8))
    trainer.train()
    folder = tmp_path / f"checkpoint-{2 * HALF}"
    again = AutoModelForImageClassification.from_pretrained(folder)
    assert state_of(again) == "latent"
    assert again.config.quantization_config.state == "latent"
    assert same(again, trainer.model)
    with torch.no_grad():
        images = crops(4, SIDE)
        assert torch.equal(again.eval()(images).logits, trainer.model.eval()(images).logits)


def test_a_reloaded_checkpoint_trains_on(tmp_path, crops):
    data = examples(crops, 8)
    proxconnect(tmp_path / "a", make(1), data).train()
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "a" / f"checkpoint-{HALF}")
    before = copy.deepcopy(again)
    proxconnect(tmp_path / "b", again, data).train()
    for (name, layer), (_, old) in zip(latent_layers(again), latent_layers(before)):
        assert not torch.equal(layer.weight, old.weight), name


def test_save_model_is_latent_and_packs_to_the_same(tmp_path, crops):
    trainer = proxconnect(tmp_path, make(1), examples(crops, 8))
    trainer.train()
    trainer.save_model(str(tmp_path / "latent"))
    proxbit.pack(trainer.model).save_pretrained(tmp_path / "packed")
    latent, packed = (
        AutoModelForImageClassification.from_pretrained(tmp_path / n).eval() for n in ("latent", "packed")
    )
    assert (state_of(latent), state_of(packed)) == ("latent", "packed")
    with torch.no_grad():
        images = crops(4, SIDE)
        torch.testing.assert_close(latent(images).logits, packed(images).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_model_is_that_with_the_best_hard_value(tmp_path, crops, family):
    """Scripted scores, hard and soft in turn: the middle evaluation is the best hard one and the worst soft one."""
    scores = iter([0.1, 0.8, 0.9, 0.2, 0.3, 0.95])
    args = ProxConnectArguments(
        **settings(
            tmp_path,
            max_steps=6,
            save_steps=2,
            eval_steps=2,
            eval_strategy="steps",
            load_best_model_at_end=True,
            metric_for_best_model="score",
        )
    )
    trainer = ProxConnectTrainer(
        model=make(1, family),
        args=args,
        train_dataset=examples(crops, 8),
        eval_dataset=examples(crops, 4),
        compute_metrics=lambda prediction: {"score": next(scores)},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best, last = (AutoModelForImageClassification.from_pretrained(tmp_path / f"checkpoint-{n}") for n in (4, 6))
    assert same(trainer.model, best)
    assert not same(best, last)
    evaluations = [entry for entry in trainer.state.log_history if "eval_score" in entry]
    assert [entry["eval_score"] for entry in evaluations] == [0.1, 0.9, 0.3]
    assert [entry["eval_soft_score"] for entry in evaluations] == [0.8, 0.2, 0.95]


def with_a_head(seed):
    """A head of its own, and fewer blocks than the configuration says."""
    torch.manual_seed(seed)
    model = vit_with_dropout()
    model.classifier = nn.Sequential(nn.LayerNorm(36), nn.Linear(36, LABELS))
    model.vit.layers = model.vit.layers[:1]
    return proxbit.binarize(model)


def test_a_model_that_its_configuration_does_not_describe_resumes_and_ends_with_its_best(tmp_path, crops):
    """Scripted scores, hard and soft in turn: the first evaluation is the best one."""
    data = examples(crops, 8)
    whole = proxconnect(tmp_path / "whole", with_a_head(1), data)
    whole.train()
    proxconnect(tmp_path / "parts", with_a_head(1), data, callbacks=[Stop()]).train()
    rest = proxconnect(tmp_path / "parts", with_a_head(2), data)
    rest.train(resume_from_checkpoint=True)
    assert same(rest.model, whole.model)

    scores = iter([0.9, 0.9, 0.1, 0.1])
    changes = dict(eval_strategy="steps", eval_steps=HALF, load_best_model_at_end=True, metric_for_best_model="score")
    trainer = ProxConnectTrainer(
        model=with_a_head(1),
        args=ProxConnectArguments(**settings(tmp_path / "best", hard_fraction=0.3, weight_decay=0.1, **changes)),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda prediction: {"score": next(scores)},
    )
    trainer.train()
    first = with_a_head(3)
    load_weights(first, tmp_path / "parts" / f"checkpoint-{HALF}")
    assert same(trainer.model, first) and not same(trainer.model, whole.model)


def test_the_stock_trainer_trains_a_latent_model(tmp_path, crops):
    model = make(1)
    before = copy.deepcopy(model)
    args = TrainingArguments(**settings(tmp_path))
    trainer = Trainer(model=model, args=args, train_dataset=examples(crops, 8))
    trainer.train()
    for (name, layer), (_, old) in zip(latent_layers(model), latent_layers(before)):
        assert not torch.equal(layer.weight, old.weight), name
    again = AutoModelForImageClassification.from_pretrained(tmp_path / f"checkpoint-{2 * HALF}")
    assert state_of(again) == "latent"
    assert same(again, model)


@pytest.mark.parametrize("reloaded", [False, True], ids=["packed in hand", "reloaded"])
def test_the_stock_trainer_refuses_a_packed_model(tmp_path, reloaded):
    model = proxbit.pack(make(1))
    if reloaded:
        model.save_pretrained(tmp_path / "packed")
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="You cannot perform fine-tuning on purely quantized models"):
        Trainer(model=model, args=TrainingArguments(**settings(tmp_path / "out")))
