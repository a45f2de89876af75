"""What the Trainer tells of a run, and the model card that it writes."""

import json

import datasets
import pytest
import transformers as hf
from huggingface_hub import ModelCard

import proxbit
from proxbit.analysis.card import quantization_card
from proxbit.analysis.run import RUN_FIELDS
from proxbit.training import ProxConnectArguments, ProxConnectTrainer
from proxbit.training.metrics import classification_metrics
from tiny_models import LABELS, SIDE, vit


def examples(crops, count):
    return [{"pixel_values": image, "labels": i % LABELS} for i, image in enumerate(crops(count, SIDE))]


class EvaluateOnce(hf.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step == 1


def make(folder, crops, *, activations="float", teacher=None, data=None, **changes):
    fixed = dict(report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no")
    training = dict(per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2, seed=7)
    model = hf.ViTForImageClassification(vit())
    return ProxConnectTrainer(
        model=proxbit.binarize(model, proxbit.BinarizationConfig(activations=activations)),
        args=ProxConnectArguments(str(folder), **(fixed | training | changes)),
        train_dataset=data or examples(crops, 8),
        eval_dataset=data or examples(crops, 6),
        compute_metrics=classification_metrics,
        teacher=teacher,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("out") / "leaves"


@pytest.fixture(scope="module")
def trainer(folder, crops):
    made = make(folder, crops, activations="sign", teacher=hf.ViTForImageClassification(vit()))
    made.train()
    made.evaluate()
    return made


def test_facts_of_a_run(trainer):
    run = trainer.run_record()
    assert list(run) == [field.name for field in RUN_FIELDS]
    assert json.loads(json.dumps(run)) == run
    known = {name: run[name] for name in ("train_samples", "eval_samples", "epochs", "steps", "seeds", "teacher")}
    assert known == {
        **{"train_samples": 8, "eval_samples": 6, "epochs": 1.0, "steps": 2, "seeds": [7]},
        "teacher": "ViTForImageClassification",
    }
    assert run["calibration_samples"] == 8, "4 batches of 4 would be more than there are"
    assert run["train_seconds"] > 0
    unknown = ("model_id", "base_model", "license", "recipe", "dataset", "dataset_id", "split", "std", "latency")
    assert {run[name] for name in unknown} == {None}


def test_arguments_are_those_that_were_used(trainer):
    arguments = trainer.run_record()["arguments"]
    assert arguments["learning_rate"] == 1e-2 and arguments["distillation_temperature"] == 2.0
    assert arguments["per_device_train_batch_size"] == 4 and arguments["lr_scheduler_type"] == "linear"
    kind, start, end = proxbit.BinarizationConfig().quantizer_pair().schedule
    assert [arguments[f"mu_{name}"] for name in ("schedule", "start", "end")] == [kind, start, end]
    assert not {"output_dir", "hub_token", "logging_dir"} & set(arguments)


def test_metrics_are_hard_and_soft(trainer):
    entry = trainer.state.log_history[-1]
    metrics = trainer.run_record()["metrics"]
    assert set(metrics) == {"hard", "soft"}
    assert metrics["hard"]["accuracy"] == entry["eval_accuracy"]
    assert metrics["soft"]["loss"] == entry["eval_soft_loss"] != metrics["hard"]["loss"]
    assert set(metrics["hard"]) == {"accuracy", "balanced_accuracy", "loss"} == set(metrics["soft"])


def test_the_environment_names_no_path(trainer):
    environment = trainer.run_record()["environment"]
    assert environment["device"] == "cpu" and environment["torch"] and environment["processor"]
    assert "/root" not in json.dumps(environment) and "site-packages" not in json.dumps(environment)


def test_metrics_of_other_weights_are_not_told(tmp_path, crops):
    """The evaluation was before the last step; and before training there is none at all."""
    trainer = make(tmp_path, crops)
    trainer.add_callback(EvaluateOnce())
    before = trainer.run_record()
    assert [before[name] for name in ("metrics", "steps", "epochs", "seeds", "calibration_samples")] == [None] * 5
    assert before["teacher"] == "none" and before["arguments"]["mu_end"] is None
    trainer.train()
    assert any("eval_accuracy" in entry for entry in trainer.state.log_history)
    assert trainer.run_record()["metrics"] is None
    assert trainer.run_record()["calibration_samples"] is None


def test_metrics_of_the_best_model(tmp_path, crops):
    """The model goes back to an earlier step, and so do its metrics."""
    how = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True)
    trainer = make(tmp_path, crops, max_steps=3, learning_rate=0.5, metric_for_best_model="eval_loss", **how)
    trainer.train()
    step = trainer.state.best_global_step
    (entry,) = [e for e in trainer.state.log_history if e["step"] == step and "eval_loss" in e]
    assert trainer.run_record()["metrics"]["hard"]["loss"] == entry["eval_loss"]


def test_one_part_of_a_split_has_no_name(tmp_path, crops):
    """The images that were held out are not those that were trained on."""
    images = {"pixel_values": [p.tolist() for p in crops(6, SIDE)], "labels": [0, 1, 2, 0, 1, 2]}
    parts = datasets.Dataset.from_dict(images, split="train").train_test_split(test_size=2, seed=0)
    trainer = make(tmp_path, crops, data=parts["train"])
    trainer.eval_dataset = parts["test"]
    found = trainer.run_record()
    assert (found["train_split"], found["train_samples"], found["split"], found["eval_samples"]) == (
        "train",
        4,
        None,
        2,
    )


def test_metrics_of_several_data_sets(tmp_path, crops):
    """Each has its own, hard and soft; a name may look like a variant."""
    trainer = make(tmp_path, crops)
    trainer.eval_dataset = {"near": examples(crops, 4), "soft": examples(crops, 6)}
    trainer.train()
    trainer.evaluate()
    near, soft = trainer.state.log_history[-2:]
    metrics = trainer.run_record()["metrics"]
    names = {f"{data}_{name}" for data in ("near", "soft") for name in ("accuracy", "balanced_accuracy", "loss")}
    assert set(metrics["hard"]) == set(metrics["soft"]) == names
    hard = (near["eval_near_loss"], soft["eval_soft_loss"])
    assert (metrics["hard"]["near_loss"], metrics["hard"]["soft_loss"]) == hard
    assert metrics["soft"]["near_loss"] == near["eval_near_soft_loss"] != near["eval_near_loss"]
    assert metrics["soft"]["soft_loss"] == soft["eval_soft_soft_loss"]


def test_metrics_of_other_data_are_not_told(tmp_path, crops):
    """Before its own and after it; its own may be named."""
    trainer = make(tmp_path, crops)
    trainer.train()
    trainer.evaluate(examples(crops, 2))
    trainer.evaluate({"a": examples(crops, 2), "b": examples(crops, 3)})
    assert trainer.run_record()["metrics"] is None
    trainer.evaluate(trainer.eval_dataset)
    told = trainer.run_record()["metrics"]
    assert told["hard"]["loss"] == trainer.state.log_history[-1]["eval_loss"]
    trainer.evaluate(trainer.train_dataset)
    assert trainer.run_record()["metrics"] == told


def test_the_seconds_of_a_resumed_run_are_unknown(tmp_path, crops):
    """Those before the checkpoint are in no record; a new training counts them anew."""
    make(tmp_path, crops, save_strategy="steps", save_steps=1).train()
    trainer = make(tmp_path, crops)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.run_record()["train_seconds"] is None and trainer.run_record()["steps"] == 2
    trainer.train()
    assert trainer.run_record()["train_seconds"] > 0


def test_data_sets_tell_their_names(tmp_path, crops):
    images = {"pixel_values": [p.tolist() for p in crops(4, SIDE)], "labels": [0, 1, 2, 0]}
    data = datasets.Dataset.from_dict(images, split="validation")
    unnamed = make(tmp_path, crops, data=data).run_record()
    assert (unnamed["split"], unnamed["train_split"], unnamed["dataset"]) == ("validation", "validation", None)
    data.info.dataset_name, data.info.builder_name, data.info.config_name = "beans", "parquet", "default"
    named = make(tmp_path, crops, data=data).run_record()
    assert (named["dataset"], named["dataset_id"], named["dataset_config"]) == ("beans", None, None)
    data.info.download_checksums = {"hf://datasets/AI-Lab-Makerere/beans@90c7/data/train.parquet": {}}
    known = make(tmp_path, crops, data=data).run_record()
    assert known["dataset"] == known["dataset_id"] == "AI-Lab-Makerere/beans"
    assert known["dataset_config"] == "default"


def test_cards_take_the_record(trainer):
    card = quantization_card(trainer.model, run=trainer.run_record())
    assert (card.task, card.labelled_samples, card.calibration_samples) == ("QAT", 8, 8)
    assert card.quantized_top1 == trainer.state.log_history[-1]["eval_accuracy"]


def test_the_trainer_writes_the_model_card(trainer, folder):
    """What is given wins over what the run knows."""
    trainer.create_model_card(
        license="mit", tags="leaves", dataset_tags=["me/leaves"], dataset="Leaves", finetuned_from="me/vit"
    )
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["license"] == "mit" and card.data.base_model == "me/vit"
    assert card.data.datasets == ["me/leaves"] and card.data.model_name == "leaves"
    assert {"proxbit", "latent", "leaves"} <= set(card.data.tags)
    assert {result.metric_type for result in card.data.eval_results} == {"accuracy", "balanced_accuracy"}
    assert "`learning_rate" not in card.text and "learning_rate: 0.01" in card.text
    assert sorted(path.name for path in folder.iterdir()) == ["README.md"]
