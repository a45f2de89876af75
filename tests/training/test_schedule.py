"""When layers begin to be binary, and what they compute until then."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    ViTForImageClassification,
    ViTModel,
)

import proxbit
from proxbit.errors import ConfigError, UnknownNameError
from proxbit.nn import latent_layers
from proxbit.training import LayerScores, ProxConnectCallback, overflow_penalty, overflow_shares, stages
from tiny_models import FAMILIES, SIDE, vit


@pytest.fixture
def model():
    return proxbit.binarize(FAMILIES["vit"](), proxbit.BinarizationConfig(activations="sign"))


def names(model, found):
    known = {id(layer): name for name, layer in latent_layers(model)}
    return [known[id(stage.layer)] for stage in found]


def test_together(model):
    found = stages(model, 100)
    assert {(stage.weight, stage.activation) for stage in found} == {(0, 0)}
    assert names(model, found) == [name for name, _ in latent_layers(model)]


def test_activations_first(model):
    assert {(stage.weight, stage.activation) for stage in stages(model, 101, activations_first=0.5)} == {(50, 0)}


def test_front_to_back(model):
    found = stages(model, 120, progression="front-to-back")
    assert names(model, found) == [name for name, _ in latent_layers(model)]
    assert (
        [stage.weight for stage in found] == [stage.activation for stage in found] == [60 * i // 12 for i in range(12)]
    )


def test_feed_forward_first(model):
    found = stages(model, 120, activations_first=0.5, progression="mlp-first")
    order = names(model, found)
    assert all(".mlp." in name for name in order[:4]) and not any(".mlp." in name for name in order[4:])
    assert [stage.weight - stage.activation for stage in found] == [60] * 12
    assert found[-1].weight < 120


def test_the_least_sensitive_first(model):
    """Those that are equal keep their places."""
    known = [name for name, _ in latent_layers(model)]
    scores = dict(zip(known, [3.0, 1.0, 2.0] + [5.0] * 8 + [0.5], strict=True))
    found = stages(model, 120, progression="taylor", scores=scores)
    assert names(model, found) == [known[place] for place in (11, 1, 2, 0, 3, 4, 5, 6, 7, 8, 9, 10)]
    assert [stage.weight for stage in found] == [60 * i // 12 for i in range(12)]
    del scores[known[4]]
    with pytest.raises(ConfigError, match=f"'taylor' goes by scores of layers, and {known[4]} has none"):
        stages(model, 120, progression="taylor", scores=scores)


@pytest.mark.parametrize("family", ["vit", "beit", "swin", "dinov2", "clip", "mobilevit", "convnext"])
def test_feed_forward_layers_are_known_in_every_family(family):
    model = proxbit.binarize(FAMILIES[family](), proxbit.BinarizationConfig())
    order = names(model, stages(model, 100, progression="mlp-first"))
    attention = ["att" in name for name in order]
    assert attention == sorted(attention)


def test_unknown_orders_are_refused(model):
    with pytest.raises(
        UnknownNameError, match="Unknown progression 'backwards'.*front-to-back, mlp-first, taylor, together"
    ):
        stages(model, 10, progression="backwards")


def test_until_then_a_layer_is_float(model):
    """Weights, activations, both; never in evaluation, which is what ships."""
    layer = model.vit.layers[0].mlp.fc1.train()
    x = torch.randn(3, layer.in_features)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    quantized = layer.activation(x, hard=False)
    hard = layer.eval()(x)
    cases = {
        frozenset({"weight", "activation"}): plain,
        frozenset({"weight"}): nn.functional.linear(quantized, layer.weight, layer.bias),
        frozenset({"activation"}): nn.functional.linear(x, layer.effective_weight(hard=False), layer.bias),
    }
    for waits, expected in cases.items():
        layer.waits = waits
        torch.testing.assert_close(layer.train()(x), expected)
        torch.testing.assert_close(layer.eval()(x), hard)
        layer.hardened = True
        torch.testing.assert_close(layer.train()(x), hard)
        layer.hardened = False


@pytest.mark.parametrize("bits", [None, 4], ids=["wide sums", "sums of 4 bits"])
def test_waiting_layers_are_float_once_they_are_calibrated_too(bits, crops):
    """What calibration takes off the inputs and gives to the biases is still there, and no sum is cut."""
    float_model, pixels = FAMILIES["vit"]().eval(), crops(4, SIDE)
    for module in float_model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.bias)
    expected = float_model(pixels).logits
    config = proxbit.BinarizationConfig(weights="fp", activations="sign", accumulator_bits=bits)
    model = proxbit.calibrate(proxbit.binarize(float_model, config), [pixels], weights=False).train()
    assert max(float(layer.activation.threshold.detach().abs().max()) for _, layer in latent_layers(model)) > 1
    model(pixels)
    for _, layer in latent_layers(model):
        layer.waits = frozenset({"weight", "activation"})
    torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-4, atol=1e-5)
    assert overflow_shares(model) == {} and not overflow_penalty(model).requires_grad


def test_the_callback_lets_layers_join(tmp_path, model):
    layers = dict(latent_layers(model))
    first, last = layers["vit.layers.0.attention.q_proj"], layers["vit.layers.1.mlp.fc2"]
    args = TrainingArguments(str(tmp_path), use_cpu=True, logging_strategy="no", report_to="none")
    Accelerator(cpu=True)  # as a Trainer sets it up
    proxbit.calibrate(model, [torch.rand(2, 3, SIDE, SIDE)], weights=False)
    mu = dict(mu_schedule="linear", mu_start=1.0, mu_end=8.0, hard_fraction=0.2)
    callback = ProxConnectCallback(**mu, activations_first=0.2, progression="front-to-back")
    seen = []

    def tell(event, step):
        state = TrainerState(global_step=step, max_steps=100)
        getattr(callback, event)(args, state, TrainerControl(), model=model)

    tell("on_train_begin", 0)
    for step in range(100):
        tell("on_step_begin", step)
        seen.append((set(first.waits), float(first.mu), set(last.waits), float(last.mu), last.hardened))
    assert seen[0][0] == {"weight"} and seen[20][0] == set() and seen[0][1] == seen[20][1] == 1.0
    assert seen[0][2] == {"weight", "activation"} and seen[40][2] == {"weight"} and seen[57][2] == set()
    assert seen[56][3] == 1.0 and seen[79][3] == pytest.approx(8.0, abs=0.2)
    assert [row[4] for row in seen] == [step >= 80 for step in range(100)]
    mus = [row[3] for row in seen]
    assert mus == sorted(mus)
    # A pure function of the step: resuming in the middle gives the same.
    tell("on_train_begin", 57)
    assert (set(first.waits), float(first.mu), set(last.waits), float(last.mu), last.hardened) == seen[57]


def examples(crops, count=12):
    return [{"pixel_values": pixels, "labels": i % 3} for i, pixels in enumerate(crops(count, SIDE))]


def test_a_model_trains_through_its_stages(crops, tmp_path):
    arguments = proxbit.ProxConnectArguments(
        str(tmp_path),
        recipe="w1a1-two-stage",
        progression="mlp-first",
        hard_fraction=0.2,
        max_steps=6,
        report_to="none",
        save_strategy="no",
    )
    trainer = proxbit.ProxConnectTrainer(model=FAMILIES["vit"](), args=arguments, train_dataset=examples(crops))
    trainer.train()
    assert all(layer.waits == set() and layer.hardened for _, layer in latent_layers(trainer.model))
    proxbit.pack(trainer.model)


class Watch(TrainerCallback):
    """What layers wait for in each step; ends the run after some of them."""

    def __init__(self, last=None):
        self.last, self.waiting = last, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.waiting.append({tuple(layer.waits) for _, layer in latent_layers(model)})
        control.should_training_stop = state.global_step == self.last


@pytest.mark.filterwarnings("ignore:Training ended soft")
def test_a_second_run_has_stages_of_its_own(crops, tmp_path):
    """The first one stopped early, when all weights were float still."""
    model, data = proxbit.binarize(FAMILIES["vit"](), proxbit.BinarizationConfig()), examples(crops)
    runs = [(dict(activations_first=0.5), Watch(2), ("weight",)), ({}, Watch(), ())]
    for changes, watch, waits in runs:
        arguments = proxbit.ProxConnectArguments(
            str(tmp_path), max_steps=8, report_to="none", save_strategy="no", use_cpu=True, **changes
        )
        trainer = proxbit.ProxConnectTrainer(model=model, args=arguments, train_dataset=data, callbacks=[watch])
        trainer.train()
        assert watch.waiting == [{waits}] * (watch.last or 8)


class Joining(TrainerCallback):
    """The layers in the order in which they cease to wait."""

    def __init__(self):
        self.order = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.order += [name for name, layer in latent_layers(model) if not layer.waits and name not in self.order]


def uneven(seed=1):
    """With dropout, and weights that are large enough for its layers to differ."""
    torch.manual_seed(seed)
    return ViTForImageClassification(vit(initializer_range=0.2, hidden_dropout_prob=0.3))


def by_taylor(folder, data, **kwargs):
    arguments = proxbit.ProxConnectArguments(
        str(folder),
        progression="taylor",
        max_steps=24,
        per_device_train_batch_size=3,
        hard_fraction=0.2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    model = kwargs.pop("model", None) or proxbit.binarize(uneven(), proxbit.BinarizationConfig())
    return proxbit.ProxConnectTrainer(model=model, args=arguments, train_dataset=data, **kwargs)


def kept(trainer):
    return next(each.scores for each in trainer.callback_handler.callbacks if isinstance(each, LayerScores))


def test_a_run_takes_the_least_sensitive_layers_first(crops, tmp_path):
    """By the loss of training, the teacher's half included, on the first four batches of three."""
    data, plain, teacher, joining = examples(crops, 15), uneven().eval(), uneven(seed=2), Joining()
    trainer = by_taylor(tmp_path, data, teacher=teacher, callbacks=[joining])
    trainer.train()
    pixels, labels = torch.stack([each["pixel_values"] for each in data[:12]]), torch.arange(12) % 3
    logits = plain(pixels).logits
    softened = [(found / 2).log_softmax(-1) for found in (logits, teacher.eval()(pixels).logits.detach())]
    divergence = (softened[1].exp() * (softened[1] - softened[0])).sum(-1).mean()
    (0.5 * nn.functional.cross_entropy(logits, labels) + 0.5 * 4 * divergence).backward()
    expected = {}
    for name in kept(trainer):
        weight = plain.get_submodule(name).weight
        hard = weight.sign() * weight.abs().mean(dim=1, keepdim=True)
        expected[name] = abs(float((weight.grad * (hard - weight).detach()).sum()))
    assert kept(trainer) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert joining.order == sorted(expected, key=expected.get) != list(expected)


def test_every_process_and_every_run_has_the_same_scores(crops, tmp_path, monkeypatch):
    """Whatever the random numbers; and where processes differ, those of the first one count."""
    data, found = examples(crops), []
    for seed in (1, 2):
        trainer = by_taylor(tmp_path, data)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        trainer._score()
        found.append(kept(trainer))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]
    monkeypatch.setattr("proxbit.training.lookahead.broadcast", lambda values: values.flip(0))
    trainer._score()
    assert list(kept(trainer).values()) == list(found[0].values())[::-1]


def test_without_a_loss_there_is_no_sensitivity(crops, tmp_path):
    """Of a model for features, and of one for classes without labels."""
    data = examples(crops)
    features = proxbit.binarize(ViTModel(vit()), proxbit.BinarizationConfig())
    unlabelled = [{"pixel_values": each["pixel_values"]} for each in data]
    for trainer in (by_taylor(tmp_path, data, model=features), by_taylor(tmp_path, unlabelled)):
        with pytest.raises(
            ConfigError, match="progression='taylor' takes gradients of the training loss.*did not return"
        ):
            trainer.train()
