"""What is looked at before the first step is trained on too, also of data that can be read once."""

import logging

import datasets
import pytest
import torch
from transformers import ViTForImageClassification

import proxbit
from proxbit.config import BinarizationConfig
from proxbit.training import ProxConnectArguments, ProxConnectTrainer
from proxbit.training.metrics import classification_metrics
from streams import Again, Endless, Once
from tiny_models import LABELS, SIDE, vit

BATCH, STEPS = 2, 7


def from_generator(examples):
    return datasets.IterableDataset.from_generator(lambda: iter(examples))


def once_from_generator(examples):
    rest = iter(examples)
    return datasets.IterableDataset.from_generator(lambda: rest)


@pytest.fixture(scope="module")
def examples(crops):
    return [{"pixel_values": image, "labels": i % LABELS} for i, image in enumerate(crops(BATCH * STEPS, SIDE))]


@pytest.fixture
def prepare(tmp_path):
    """A function that makes a trainer of a model with quantizers to start, of one layer."""

    def make(activations="sign", **changes):
        torch.manual_seed(0)
        model = ViTForImageClassification(vit(num_hidden_layers=1))
        data = {name: changes.pop(name) for name in ("train_dataset", "eval_dataset") if name in changes}
        fixed = dict(report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no")
        training = dict(max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=1e-2)
        return ProxConnectTrainer(
            proxbit.binarize(model, BinarizationConfig(activations=activations)),
            ProxConnectArguments(str(tmp_path), **fixed | training | changes),
            compute_metrics=classification_metrics,
            **data,
        )

    return make


@pytest.fixture(scope="module")
def of_a_list():
    """What trainings of a list that is not shuffled end with, by progression."""
    return {}


@pytest.mark.filterwarnings("ignore:Training ended soft")
@pytest.mark.parametrize(
    ("stream", "progression"),
    [
        (Once, "together"),
        (Endless, "taylor"),
        (Again, "together"),
        (from_generator, "together"),
        (once_from_generator, "taylor"),
    ],
)
def test_a_stream_is_trained_on_from_its_first_example(prepare, examples, of_a_list, stream, progression):
    """As a list, to the last bit."""

    def weights(data):
        trainer = prepare(train_dataset=data, progression=progression, train_sampling_strategy="sequential")
        trainer.train()
        assert trainer.state.global_step == STEPS and trainer.train_dataset is data
        return trainer.model.state_dict()

    if progression not in of_a_list:
        of_a_list[progression] = weights(examples)
    found = weights(stream(examples))
    assert all(torch.equal(value, found[name]) for name, value in of_a_list[progression].items())


@pytest.fixture
def said(caplog):
    """A function: the lines of the log so far."""
    caplog.set_level(logging.WARNING, logger="proxbit")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("stream", [Once, Endless, once_from_generator])
def test_a_set_that_can_be_read_once_is_evaluated_hard(prepare, examples, said, stream):
    whole = prepare("float", eval_dataset=examples).evaluate()
    found = prepare("float", eval_dataset=stream(examples)).evaluate()
    for name in ("eval_loss", "eval_accuracy", "eval_balanced_accuracy"):
        assert found[name] == pytest.approx(whole[name])
    assert "eval_soft_loss" in whole and not any("soft" in name or "gap" in name for name in found)
    assert said() == ["The data of Evaluation can be read once: soft values are left out."]


@pytest.mark.parametrize("stream", [Again, from_generator])
def test_a_set_that_can_be_read_again_has_soft_values(prepare, examples, said, stream):
    whole = prepare("float", eval_dataset=examples).evaluate()
    found = prepare("float", eval_dataset=stream(examples)).evaluate()
    assert found["eval_soft_loss"] == pytest.approx(whole["eval_soft_loss"]) and said() == []


def test_of_several_sets_each_is_read_as_often_as_it_can_be(prepare, examples):
    found = prepare("float", eval_dataset={"once": Once(examples), "list": examples}).evaluate()
    assert {"eval_once_loss", "eval_list_loss", "eval_list_soft_loss"} <= found.keys()
    assert "eval_once_soft_loss" not in found and found["eval_once_loss"] == pytest.approx(found["eval_list_loss"])


def test_predictions_of_a_stream(prepare, examples):
    trainer = prepare("float")
    found = trainer.predict(Once(examples))
    assert found.predictions.shape == (len(examples), LABELS) and "test_soft_loss" not in found.metrics
