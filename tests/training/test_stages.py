"""When layers begin to be binary, and what they compute until then."""

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState

import proxbit
from proxbit.errors import UnknownNameError
from proxbit.nn import latent_layers
from proxbit.quantizers import MuSchedule
from proxbit.training import MuCallback, overflow_shares, stages
from proxbit.training.monitor import overflow_penalty
from tiny_models import FAMILIES, SIDE


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


@pytest.mark.parametrize("family", ["vit", "beit", "swin", "dinov2", "clip", "mobilevit", "convnext"])
def test_feed_forward_layers_are_known_in_every_family(family):
    model = proxbit.binarize(FAMILIES[family](), proxbit.BinarizationConfig())
    order = names(model, stages(model, 100, progression="mlp-first"))
    attention = ["att" in name for name in order]
    assert attention == sorted(attention)


def test_unknown_orders_are_refused(model):
    with pytest.raises(UnknownNameError, match="Unknown progression 'backwards'.*front-to-back, mlp-first, together"):
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
    model = proxbit.calibrate(proxbit.binarize(float_model, config), [pixels]).train()
    assert max(float(layer.activation.threshold.detach().abs().max()) for _, layer in latent_layers(model)) > 1
    model(pixels)
    for _, layer in latent_layers(model):
        layer.waits = frozenset({"weight", "activation"})
    torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-4, atol=1e-5)
    assert overflow_shares(model) == {} and not overflow_penalty(model).requires_grad


def test_the_callback_lets_layers_join(model):
    layers = dict(latent_layers(model))
    first, last = layers["vit.layers.0.attention.q_proj"], layers["vit.layers.1.mlp.fc2"]

    def begin(steps):
        return MuSchedule("linear", 1.0, 8.0, steps, hard_fraction=0.2)

    callback = MuCallback(
        model, begin, lambda steps: stages(model, steps, activations_first=0.2, progression="front-to-back")
    )
    seen = []
    callback.on_train_begin(None, TrainerState(global_step=0, max_steps=100), TrainerControl())
    for step in range(100):
        callback.on_step_begin(None, TrainerState(global_step=step, max_steps=100), TrainerControl())
        seen.append((set(first.waits), float(first.mu), set(last.waits), float(last.mu), last.hardened))
    assert seen[0][0] == {"weight"} and seen[20][0] == set() and seen[0][1] == seen[20][1] == 1.0
    assert seen[0][2] == {"weight", "activation"} and seen[40][2] == {"weight"} and seen[57][2] == set()
    assert seen[56][3] == 1.0 and seen[79][3] == pytest.approx(8.0, abs=0.2)
    assert [row[4] for row in seen] == [step >= 80 for step in range(100)]
    mus = [row[3] for row in seen]
    assert mus == sorted(mus)
    # A pure function of the step: resuming in the middle gives the same.
    callback.on_train_begin(None, TrainerState(global_step=57, max_steps=100), TrainerControl())
    assert (set(first.waits), float(first.mu), set(last.waits), float(last.mu), last.hardened) == seen[57]


def test_a_model_trains_through_its_stages(crops, tmp_path):
    examples = [{"pixel_values": pixels, "labels": i % 3} for i, pixels in enumerate(crops(12, SIDE))]
    arguments = proxbit.ProxConnectArguments(
        str(tmp_path),
        recipe="w1a1-two-stage",
        progression="mlp-first",
        hard_fraction=0.2,
        max_steps=6,
        report_to="none",
        save_strategy="no",
    )
    trainer = proxbit.ProxConnectTrainer(model=FAMILIES["vit"](), args=arguments, train_dataset=examples)
    trainer.train()
    assert all(layer.waits == set() and layer.hardened for _, layer in latent_layers(trainer.model))
    proxbit.pack(trainer.model)
