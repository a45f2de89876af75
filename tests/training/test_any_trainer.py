"""`ProxConnectCallback` in Trainers that know nothing of it: the stock one, one's own, and one of another library."""

import json
import warnings

import datasets
import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTForImageClassification,
)

import proxbit
from proxbit.analysis.run_log import RUN_LOG
from proxbit.errors import ConfigError, LossError, ModelStateError
from proxbit.nn import latent_layers
from proxbit.training import (
    DistillationLoss,
    LayerScores,
    ProxConnectArguments,
    ProxConnectTrainer,
    parameter_groups,
)
from streams import Once
from tiny_models import LABELS, SIDE, vit

STEPS = 10
FIXED = dict(report_to="none", disable_tqdm=True, use_cpu=True, max_steps=STEPS, per_device_train_batch_size=4)
OFTEN = dict(logging_steps=2, save_steps=4, learning_rate=1e-2, optim="adamw_torch")


@pytest.fixture(scope="module")
def data(crops):
    return [{"pixel_values": image, "labels": i % LABELS} for i, image in enumerate(crops(14, SIDE))]


def floating(seed=1):
    torch.manual_seed(seed)
    model = ViTForImageClassification(vit(num_hidden_layers=1))
    nn.init.normal_(model.classifier.weight)
    return model


def latent(**config):
    return proxbit.binarize(floating(), proxbit.BinarizationConfig(**{"weights": "bnn++"} | config))


class Steps(TrainerCallback):
    """mu, and whether the layers are hard, in each step that is taken."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        layers = [layer for _, layer in latent_layers(model)]
        self.seen.append((state.global_step, [(float(each.mu), each.hardened, each.waits) for each in layers]))


class Own(Trainer):
    """What Trainers of other libraries override: the loss, the optimizer and the step."""

    steps_taken = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = parameter_groups(
                self.model, learning_rate=self.args.learning_rate, weight_decay=0.1, latent_learning_rate_factor=2.0
            )
            self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer

    def training_step(self, *args, **kwargs):
        self.steps_taken += 1
        return super().training_step(*args, **kwargs)


def train(kind, folder, model, data, callback=None, resume=None, callbacks=(), **changes):
    """Train as a user of this kind of Trainer does; returns it, and what was seen in its steps."""
    own = kind is ProxConnectTrainer
    args = (ProxConnectArguments if own else TrainingArguments)(str(folder), **FIXED | OFTEN | changes.pop("args", {}))
    steps = Steps()
    one_line = [] if own else [callback or proxbit.ProxConnectCallback()]
    trainer = kind(model, args, train_dataset=data, callbacks=[*callbacks, *one_line, steps], **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer.train(resume_from_checkpoint=resume)
    return trainer, steps.seen


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


MEASURES = ("loss", "mu", "flip_ratio", "hardening_gap")


def measured(trainer):
    return [[each[name] for name in MEASURES] for each in trainer.state.log_history if "loss" in each]


SETTINGS = {
    "plain": ({}, {}),
    "a step from P(w*)": ({"weights": "proxquant"}, {"hard_fraction": 0.3}),
    "stages": ({"activations": "int4"}, {"activations_first": 0.2, "progression": "mlp-first", "mu_end": 20.0}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_stock_trainer_takes_the_steps_of_proxconnect_trainer(tmp_path, data, name):
    """Bit for bit, with the same mu and logs; the weights of the end are hard, and packed they are the same model."""
    config, settings = SETTINGS[name]
    expected, seen = train(ProxConnectTrainer, tmp_path / "ours", latent(**config), data, args=settings)
    callback = proxbit.ProxConnectCallback(**settings)
    trainer, found = train(Trainer, tmp_path / "stock", latent(**config), data, callback)
    assert found == seen and len(seen) == STEPS
    assert same(trainer.model, expected.model)
    assert measured(trainer) == measured(expected) and max(each[2] for each in measured(trainer)) > 0
    assert all(layer.hardened and not layer.trained_soft for _, layer in latent_layers(trainer.model))
    runs = [
        [json.loads(line) for line in (tmp_path / each / RUN_LOG).read_text().splitlines()]
        for each in ("ours", "stock")
    ]
    logs = [[(each["step"], each.get("mu"), each.get("flip_ratio")) for each in run if "step" in each] for run in runs]
    assert logs[0] == logs[1]
    told = runs[1][0]["settings"]
    assert {key: told[key] for key in settings if key in told} == {
        key: settings[key] for key in settings if key in told
    }


def test_a_trainer_of_ones_own_takes_them_too(tmp_path, data):
    """With its own loss, optimizer and step: decay and the rate of the latents come with `parameter_groups`."""
    settings = dict(weight_decay=0.1, latent_learning_rate_factor=2.0)
    expected, seen = train(ProxConnectTrainer, tmp_path / "ours", latent(), data, args=settings)
    trainer, found = train(Own, tmp_path / "own", latent(), data)
    assert trainer.steps_taken == STEPS and found == seen and same(trainer.model, expected.model)
    groups = [
        [(len(group["params"]), group["weight_decay"], group["initial_lr"]) for group in each.param_groups]
        for each in (trainer.optimizer, expected.optimizer)
    ]
    assert groups[0] == groups[1]


def test_a_run_resumes_at_its_mu(tmp_path, data):
    first, seen = train(Trainer, tmp_path, latent(), data)
    again, found = train(Trainer, tmp_path, latent(), data, resume=str(tmp_path / "checkpoint-4"))
    assert found == seen[4:] and found[0][1][0][0] > 1
    assert same(again.model, first.model)


def test_scores_come_from_checkpoints_when_a_run_resumes(tmp_path, data):
    """A progression by scores takes them from `LayerScores`, and refuses to guess."""
    callback = proxbit.ProxConnectCallback(progression="taylor")
    with pytest.raises(ConfigError, match="'taylor' goes by scores of layers"):
        train(Trainer, tmp_path / "none", latent(), data, callback)
    names = [name for name, _ in latent_layers(latent())]
    scores = {name: float(len(names) - i) for i, name in enumerate(names)}
    train(Trainer, tmp_path / "run", latent(), data, callback, callbacks=[LayerScores(scores)], args=dict(save_steps=2))
    resumed = dict(callbacks=[LayerScores()], resume=str(tmp_path / "run" / "checkpoint-2"))
    _, found = train(Trainer, tmp_path / "run", latent(), data, callback, **resumed)
    waits = [bool(waits) for _, _, waits in found[0][1]]
    assert waits == sorted(waits, reverse=True) and waits[0] and not waits[-1]


def test_the_arguments_of_a_trainer_may_have_the_settings(tmp_path, data):
    """What the callback is given comes first, then the arguments, then the default."""
    args = ProxConnectArguments(str(tmp_path), **FIXED | OFTEN | dict(mu_start=1.0, mu_end=4.0, hard_fraction=0.5))
    callback, steps = proxbit.ProxConnectCallback(mu_end=2.0), Steps()
    Trainer(latent(), args, train_dataset=data, callbacks=[callback, steps]).train()
    assert steps.seen[0][1][0][:2] == (1.0, False) and steps.seen[5][1][0][:2] == (2.0, True)
    assert callback.settings["activations_first"] == 0 and callback.schedule.soft_steps == 5


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_teacher_teaches_in_the_stock_trainer(tmp_path, data, accumulated):
    """`DistillationLoss` is the loss of `ProxConnectTrainer`, bit for bit, over accumulated batches too."""
    teacher, weights = floating(2), dict(distillation_weight=0.5, distillation_tokens=0.25, distillation_gram=0.125)
    args = dict(gradient_accumulation_steps=accumulated, max_steps=4)
    expected, _ = train(ProxConnectTrainer, tmp_path / "ours", latent(), data, teacher=teacher, args=args | weights)
    model = latent()
    loss = DistillationLoss(model, teacher, **weights)
    trainer, _ = train(Trainer, tmp_path / "stock", model, data, compute_loss_func=loss, args=args)
    assert same(trainer.model, expected.model) and measured(trainer) == measured(expected)
    trainer.eval_dataset = data[:6]
    evaluated, hard = trainer.evaluate()["eval_loss"], expected.evaluate(data[:6])["eval_loss"]
    assert evaluated == pytest.approx(hard, abs=1e-6)
    with pytest.raises(ConfigError, match="needs the labels"):
        loss(None, None)
    with pytest.raises(ConfigError, match=r"Linear has no loss_function: .* task="):
        DistillationLoss(nn.Linear(2, 2), teacher)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, data):
    """The loss of a step cannot be seen by a callback: the weights are, before they are saved, or at a log."""

    class Poison(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    model.classifier.bias[0] = float("nan")

    for args in (dict(logging_strategy="no"), dict(save_strategy="no")):
        folder = tmp_path / next(iter(args))
        with pytest.raises(LossError, match=r"^classifier.bias holds NaN or infinite values after step 4 \(rank 0\)"):
            train(Trainer, folder, latent(), data, callbacks=[Poison()], args=args)
        assert not list(folder.glob("checkpoint-*"))


def test_what_cannot_be_trained_is_refused_at_once(tmp_path, data):
    with pytest.raises(ModelStateError, match="ProxConnectCallback trains latent models, this one is float"):
        train(Trainer, tmp_path, floating(), data)
    with pytest.raises(ConfigError, match="hard_fraction must be in"):
        proxbit.ProxConnectCallback(hard_fraction=2.0)
    with pytest.raises(ConfigError, match="activations_first must be in .* with hard_fraction 0.1"):
        train(Trainer, tmp_path, latent(), data, proxbit.ProxConnectCallback(activations_first=0.95))
    with pytest.raises(ConfigError, match=r"this training reads a stream.*calibrate\(model, images, weights=False\)"):
        train(Trainer, tmp_path, latent(activations="int4"), Once(data))


def sentences(tokenizers):
    """A tokenizer of seven words, and texts of them."""
    words = "one two three four five six seven".split()
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    texts = [" ".join(words[i:] + words[:i]) for i in range(7)]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"), texts


def test_a_trainer_of_another_library(tmp_path):
    """TRL's Trainer of language models, with its own loss, data and logs, takes the same steps."""
    trl, tokenizers = pytest.importorskip("trl"), pytest.importorskip("tokenizers")
    tokenizer, texts = sentences(tokenizers)

    def language_model():
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=9, pad_token_id=0, bos_token_id=1, eos_token_id=1, **sizes))
        return proxbit.binarize(model, proxbit.BinarizationConfig(weights="bnn++", include=["model.layers.*"]))

    options = FIXED | OFTEN | dict(per_device_train_batch_size=2)
    args = trl.SFTConfig(str(tmp_path / "trl"), bf16=False, gradient_checkpointing=False, loss_type="nll", **options)
    steps = [Steps(), Steps()]
    trainer = trl.SFTTrainer(
        language_model(),
        args,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        callbacks=[proxbit.ProxConnectCallback(), steps[0]],
    )
    trainer.train()
    args = ProxConnectArguments(str(tmp_path / "ours"), **options)
    data = dict(data_collator=trainer.data_collator, train_dataset=trainer.train_dataset)
    expected = ProxConnectTrainer(language_model(), args, callbacks=[steps[1]], **data)
    expected.train()
    assert steps[0].seen == steps[1].seen and all(layer.hardened for _, layer in latent_layers(trainer.model))
    # TRL sums losses in another order.
    torch.testing.assert_close(trainer.model.state_dict(), expected.model.state_dict(), rtol=1e-4, atol=1e-5)
    for found, ours in zip(measured(trainer), measured(expected), strict=True):
        assert found == pytest.approx(ours, rel=1e-4)
    assert "entropy" in next(each for each in trainer.state.log_history if "mu" in each)
