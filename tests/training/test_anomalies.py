"""Inputs that cannot be quantized stop the run, with the name of the layer."""

import pytest
import torch
from transformers import TrainerCallback

import proxbit
from proxbit.errors import ActivationError, LossError
from proxbit.nn import latent_layers
from proxbit.training import ProxConnectArguments, ProxConnectTrainer, watch_activations
from tiny_models import FAMILIES, SIDE


@pytest.fixture
def model():
    return proxbit.binarize(FAMILIES["vit"](), proxbit.BinarizationConfig(activations="int8"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.nan, "its input holds NaN or infinite values"),
        (torch.inf, "its input holds NaN or infinite values"),
        (0.0, r"its input is 0.0 everywhere: there is nothing to quantize"),
        (-2.5, r"its input is -2.5 everywhere"),
    ],
)
def test_the_layer_is_named(model, value, words):
    end = watch_activations(model)
    layer = model.vit.layers[1].mlp.fc1
    with pytest.raises(ActivationError, match=rf"^vit.layers.1.mlp.fc1: {words}"):
        layer(torch.full((2, layer.in_features), value))
    layer(torch.randn(2, layer.in_features))
    layer(torch.empty(0, layer.in_features))
    end()
    layer(torch.full((2, layer.in_features), value))


@pytest.mark.parametrize("detect", [True, False])
def test_as_an_argument_of_the_trainer(model, detect, crops, tmp_path):
    pixels = torch.full((3, SIDE, SIDE), torch.nan)
    arguments = ProxConnectArguments(
        str(tmp_path), max_steps=1, report_to="none", save_strategy="no", detect_anomalies=detect
    )
    trainer = ProxConnectTrainer(model=model, args=arguments, train_dataset=[{"pixel_values": pixels, "labels": 0}] * 4)
    expected = (
        (ActivationError, r"^vit.layers.0.attention.q_proj: its input holds NaN") if detect else (LossError, "NaN")
    )
    with pytest.raises(expected[0], match=expected[1]):
        trainer.train()
    model(torch.full((2, 3, SIDE, SIDE), torch.nan))  # Nobody watches any more.


def test_the_watch_ends_with_the_training(model, crops, tmp_path):
    """A second one does not watch twice."""
    layers = [layer for _, layer in latent_layers(model)]
    hooks = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            hooks.append([len(layer._forward_pre_hooks) for layer in layers])

    arguments = ProxConnectArguments(
        str(tmp_path), max_steps=1, report_to="none", save_strategy="no", detect_anomalies=True
    )
    data = [{"pixel_values": image, "labels": 0} for image in crops(4, SIDE)]
    before = [len(layer._forward_pre_hooks) for layer in layers]
    for _ in range(2):
        ProxConnectTrainer(model=model, args=arguments, train_dataset=data, callbacks=[Count()]).train()
        assert [len(layer._forward_pre_hooks) for layer in layers] == before
    assert hooks == [[count + 1 for count in before]] * 2
