"""`calibrate`: one bit from some images, whoever calls it and however often."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import ViTForImageClassification

import proxbit
from distributed_runs import calibrate_and_answer
from proxbit.config import BinarizationConfig
from proxbit.errors import ConfigError, ModelStateError
from proxbit.posttraining import calibration_of
from proxbit.training import ProxConnectArguments, ProxConnectTrainer
from proxbit.training.calibration import was_calibrated
from tiny_models import FAMILIES, LABELS, SIDE


def latent(activations="float", **options):
    torch.manual_seed(0)
    return proxbit.binarize(FAMILIES["vit"](), BinarizationConfig(activations=activations, **options))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("activations", ["float", "int4"])
def test_batches_change_nothing(activations, crops):
    pixels = crops(40, SIDE)
    found = [
        state(proxbit.calibrate(latent(activations), data))
        for data in (pixels, list(pixels.split(7)), DataLoader([{"pixel_values": each} for each in pixels], 3))
    ]
    assert same(found[0], found[1]) and same(found[0], found[2])


@pytest.mark.parametrize("activations", ["float", "sign"])
def test_a_model_of_half_is_fitted_as_a_single_one(activations, crops):
    """Patches are embedded by a binary convolution, so that it is covered too."""
    errors, include = [], ["vit.layers", "vit.embeddings.patch_embeddings.projection"]
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        config = BinarizationConfig(include=include, activations=activations, rprelu=True)
        model = proxbit.binarize(FAMILIES["vit"]().to(dtype), config)
        errors.append(proxbit.calibrate(model, crops(24, SIDE)).calibration_report.after)
        assert {each.dtype for each in proxbit.pack(model).state_dict().values()} == {dtype, torch.uint8}
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_it_is_written_down(tmp_path, crops):
    model = latent()
    assert not was_calibrated(model) and calibration_of(model) is None
    assert proxbit.calibrate(model, crops(20, SIDE)) is model
    report = model.calibration_report
    stored = model.config.quantization_config.calibration
    assert stored == {"images": 20, "error": round(report.after, 6)} and report.images == 20
    model.save_pretrained(tmp_path)
    again = ViTForImageClassification.from_pretrained(tmp_path)
    assert was_calibrated(again) and again.config.quantization_config.calibration == stored
    other = proxbit.binarize(FAMILIES["vit"](), model.config.quantization_config)
    assert not was_calibrated(other)


@pytest.mark.parametrize("most, expected", [(None, 300), (5, 5)])
def test_how_many_images_are_looked_at(most, expected, monkeypatch, crops):
    monkeypatch.setattr("proxbit.training.calibration.IMAGES", 300)
    model = proxbit.binarize(nn.Sequential(nn.Linear(6, 6)), BinarizationConfig(include=["*"]))
    proxbit.calibrate(model, torch.randn(400, 6), num_images=most)
    assert model.calibration_report.images == expected


def test_signs_are_shown_more_images(monkeypatch):
    monkeypatch.setattr("proxbit.training.calibration.IMAGES_OF_SIGNS", 350)
    model = proxbit.binarize(nn.Sequential(nn.Linear(6, 6)), BinarizationConfig(include=["*"], activations="sign"))
    proxbit.calibrate(model, torch.randn(400, 6))
    assert model.calibration_report.images == 350


def test_too_few_tokens_are_told(crops):
    model = latent()
    with pytest.warns(UserWarning, match=r"12 of 12 layers were fitted to fewer tokens .* 17 with 36 inputs"):
        proxbit.calibrate(model, crops(1, SIDE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        proxbit.calibrate(latent(), crops(12, SIDE))


def test_what_is_refused(crops):
    for model, hint in [
        (FAMILIES["vit"](), "this one is float. Call proxbit.binarize"),
        (proxbit.pack(latent()), "this one is packed. Load its latent checkpoint"),
    ]:
        with pytest.raises(ModelStateError, match=hint):
            proxbit.calibrate(model, crops(2, SIDE))
    model = latent()
    before = state(model)
    for wrong in (0, 2.5, True):
        with pytest.raises(ConfigError, match=f"^num_images must be a whole number, at least 1, or None; not {wrong}"):
            proxbit.calibrate(model, crops(2, SIDE), num_images=wrong)
    for nothing in ([], DataLoader([])):
        with pytest.raises(ConfigError, match="There is nothing to calibrate with: the data is empty"):
            proxbit.calibrate(model, nothing)
    with pytest.raises(ConfigError, match="NaN or infinite activations"):
        proxbit.calibrate(model, torch.full((2, 3, SIDE, SIDE), torch.nan))
    assert same(state(model), before) and not was_calibrated(model)


def test_a_configuration_that_is_used_again_says_nothing_of_another_model(tmp_path, crops):
    model = proxbit.calibrate(latent(), crops(12, SIDE))
    FAMILIES["vit"]().save_pretrained(tmp_path)
    used = model.config.quantization_config
    assert not was_calibrated(ViTForImageClassification.from_pretrained(tmp_path, quantization_config=used))


def test_of_a_spread_model_nothing_is_changed(crops):
    model = latent()
    with pytest.raises(ModelStateError, match="the device 'meta', which has no numbers"):
        proxbit.calibrate(latent().to("meta"), crops(2, SIDE))
    model.vit.layers[0].mlp.fc1.weight.ds_id = 7
    with pytest.raises(ModelStateError, match=r"vit.layers.0.mlp.fc1.weight is spread over processes"):
        proxbit.calibrate(model, crops(2, SIDE))


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("activations", ["float", "sign"])
def test_two_processes_are_one(activations, processes, crops):
    pixels = crops(64, SIDE)
    alone = calibrate_and_answer(pixels, activations)
    first, second = processes(calibrate_and_answer, pixels, activations)
    assert first["images"] == second["images"] == alone["images"] == 64
    assert torch.equal(first["answers"], second["answers"])
    torch.testing.assert_close(first["answers"], alone["answers"], rtol=0, atol=1e-5)


def arguments(folder, **changes):
    fixed = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 4}
    return ProxConnectArguments(str(folder), **(fixed | {"save_strategy": "no", "max_steps": 6} | changes))


def trainer(model, crops, args, **more):
    rows = [{"pixel_values": each, "labels": i % LABELS} for i, each in enumerate(crops(12, SIDE))]
    return ProxConnectTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, **more)


def test_the_trainer_begins_where_calibration_ended(tmp_path, crops):
    """Hard, with small steps of the latents; what was given stays."""
    model = proxbit.calibrate(latent("sign"), crops(12, SIDE))
    before = state(model)
    run = trainer(model, crops, arguments(tmp_path, learning_rate=1e-12))
    assert (run.args.hard_fraction, run.args.latent_learning_rate_factor) == (1.0, 0.1)
    run.train()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-6)
    given = trainer(latent("sign"), crops, arguments(tmp_path))
    assert (given.args.hard_fraction, given.args.latent_learning_rate_factor) == (0.1, 1.0)
    again = proxbit.calibrate(latent(), crops(12, SIDE))
    told = trainer(again, crops, arguments(tmp_path, hard_fraction=0.5, latent_learning_rate_factor=2.0))
    assert (told.args.hard_fraction, told.args.latent_learning_rate_factor) == (0.5, 2.0)


def test_the_start_is_kept_where_training_makes_it_worse(tmp_path, crops):
    model = proxbit.calibrate(latent(), crops(12, SIDE))
    start = state(model)
    changes = dict(eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3, learning_rate=0.5)
    run = trainer(model, crops, arguments(tmp_path, load_best_model_at_end=True, **changes))
    run.train()
    logged = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [0, 3, 6]
    assert logged[0]["eval_loss"] < min(entry["eval_loss"] for entry in logged[1:])
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-0")
    assert same(state(run.model), start)


def test_a_training_that_began_with_it_resumes_bit_for_bit(tmp_path, crops):
    changes = dict(save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3, learning_rate=1e-3)
    start = proxbit.calibrate(latent("int8"), crops(12, SIDE))
    whole = trainer(copy.deepcopy(start), crops, arguments(tmp_path / "whole", **changes))
    whole.train()
    run = trainer(copy.deepcopy(start), crops, arguments(tmp_path / "cut", **changes))
    run.train()
    model = ViTForImageClassification.from_pretrained(tmp_path / "cut" / "checkpoint-3")
    again = trainer(model, crops, arguments(tmp_path / "cut", **changes))
    assert again.args.hard_fraction == 1.0
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert same(state(again.model), state(whole.model))
    assert [entry["step"] for entry in again.state.log_history if "eval_loss" in entry] == [0, 3, 6]
