"""What people do to a model around training: autocast, accumulation, checkpointing, compilation, copies."""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import ViTForImageClassification

import proxbit
from kept import kept_for_backward
from proxbit.config import BinarizationConfig
from proxbit.nn import latent_layers, set_mu
from proxbit.nn.precision import trained_in_small_steps
from proxbit.training import ProxConnectArguments, ProxConnectTrainer
from tiny_models import LABELS, SIDE, vit


def floats(seed=1, **sizes):
    torch.manual_seed(seed)
    model = ViTForImageClassification(vit(**sizes))
    nn.init.normal_(model.classifier.weight)
    return model


def make(seed=1, packed=False, **sizes):
    """Patches are embedded by a binary convolution, so that it is covered too."""
    include = ["vit.layers", "vit.embeddings.patch_embeddings.projection"]
    model = proxbit.binarize(floats(seed, **sizes), BinarizationConfig(include=include)).train()
    set_mu(model, 2.0)
    return proxbit.pack(model) if packed else model


def examples(crops, count):
    return [{"pixel_values": image, "labels": i % LABELS} for i, image in enumerate(crops(count, SIDE))]


def batch(crops, count=6):
    return {"pixel_values": crops(count, SIDE), "labels": torch.arange(count) % LABELS}


def arguments(folder, **changes):
    fixed = dict(report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no")
    return ProxConnectArguments(str(folder), **(fixed | changes))


def gradients(model, inputs, **autocast):
    """Loss and gradients, the image's included."""
    model.zero_grad()
    images = inputs["pixel_values"].clone().requires_grad_()
    with torch.autocast("cpu", **(autocast or dict(enabled=False))):
        loss = model(images, labels=inputs["labels"]).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found | {"pictures": images.grad}


def close(first, second, share):
    """The distance of two gradients, in every tensor, is below this share of its size. Gradients of the keys' biases
    are zero but for rounding.
    """
    assert first.keys() == second.keys()
    size = torch.stack([value.norm() for value in second.values()]).max()
    for name, value in second.items():
        assert (first[name].float() - value).norm() <= share * max(value.norm(), 1e-2 * size), name


# --- what a step takes


def kept(model, inputs, **autocast):
    """Bytes that the forward pass keeps for the backward pass, without the parameters themselves."""
    with kept_for_backward() as found, torch.autocast("cpu", **autocast):
        loss = model(**inputs).loss
    assert loss.requires_grad
    return found.total(without=model)


def test_there_is_no_second_copy_of_the_weights(crops):
    """F_mu of a linear layer is made again in the backward pass, that of the convolution is kept. Under autocast there
    is less than with float weights, of which autocast makes copies.
    """
    floating, latent, inputs = floats().train(), make(), batch(crops)
    layers = [layer for _, layer in latent_layers(latent)]
    linear = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    conv = sum(layer.weight.numel() for layer in layers) - linear
    rows = sum(len(layer.weight) for layer in layers)
    assert linear > conv > 0
    half, single = dict(dtype=torch.bfloat16), dict(enabled=False)
    assert 4 * conv <= kept(latent, inputs, **single) - kept(floating, inputs, **single) <= 4 * conv + 16 * rows
    assert kept(latent, inputs, **half) <= kept(floating, inputs, **half) - 2 * linear + 16 * rows


@pytest.mark.parametrize("recipe", ["w1a32", "w1a8", "w1a4", "w1a1", "w1a8-acc8"])
def test_a_step_reads_no_number_back(crops, recipe):
    """Each would make a GPU wait. On the CPU, AdamW reads its own step, once a parameter."""
    inputs, model = batch(crops), floats()
    proxbit.binarize(model, proxbit.get_recipe(recipe).binarization())
    proxbit.calibrate(model, [inputs["pixel_values"]], weights=False)
    optimizer = torch.optim.AdamW(model.train().parameters())

    def step():
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()

    step()
    with torch.profiler.profile() as profile:
        step()
    reads = sum(event.name == "aten::_local_scalar_dense" for event in profile.events())
    assert reads == sum(len(state) > 0 for state in optimizer.state.values())


# --- mixed precision


@pytest.mark.parametrize("packed, dtype, share", [(False, torch.bfloat16, 0.1), (True, torch.float16, 0.02)])
def test_autocast_is_close_to_single_precision(crops, packed, dtype, share):
    model, inputs = make(packed=packed), batch(crops)
    loss, expected = gradients(model, inputs)
    mixed_loss, mixed = gradients(model, inputs, dtype=dtype)
    assert mixed_loss.item() == pytest.approx(loss.item(), rel=share)
    assert all(torch.isfinite(value).all() for value in mixed.values())
    assert all(value.dtype == torch.float32 for value in mixed.values())
    close(mixed, expected, share)
    names = [f"{name}.weight" for name, _ in latent_layers(model)]
    assert len(names) == (0 if packed else 13) and mixed.keys() >= set(names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_gives_the_logits_of_what_ships(crops, dtype):
    latent, images = make(), crops(6, SIDE)
    packed = proxbit.pack(copy.deepcopy(latent)).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        found, expected = packed(images).logits, latent.eval()(images).logits
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=40 * torch.finfo(dtype).eps)


def test_the_trainer_runs_in_bf16(tmp_path, crops):
    """Latents stay in single precision, and the run stays close to that without bf16."""
    weights, start = [], make().state_dict()
    for bf16 in (False, True):
        model = make()
        args = arguments(
            tmp_path, bf16=bf16, optim="sgd", max_steps=5, learning_rate=0.02, per_device_train_batch_size=6
        )
        ProxConnectTrainer(model=model, args=args, train_dataset=examples(crops, 6), teacher=floats(2)).train()
        assert all(layer.weight.dtype == torch.float32 for _, layer in latent_layers(model))
        weights.append(model.state_dict())
    moved = {key: (value - start[key]).norm() for key, value in weights[0].items()}
    most = max(moved.values())
    assert most > 1e-3
    for key, value in weights[1].items():
        assert (value - weights[0][key]).norm() <= 0.1 * max(moved[key], 0.05 * most), key
        assert not torch.equal(value, weights[0][key]), key


# --- models of half


def half_floats(dtype):
    return floats(num_hidden_layers=1).to(dtype)


def stored(dtype, folder):
    half_floats(dtype).save_pretrained(folder)
    return ViTForImageClassification.from_pretrained(folder, quantization_config=BinarizationConfig(weights="bnn++"))


def asked_for(dtype, folder):
    floats(num_hidden_layers=1).save_pretrained(folder)
    config = BinarizationConfig(activations="sign", rprelu=True)
    return ViTForImageClassification.from_pretrained(folder, quantization_config=config, dtype=dtype)


def in_hand(dtype, folder):
    return proxbit.binarize(half_floats(dtype), BinarizationConfig(activations="int4"))


def latent_stored(dtype, folder):
    """A checkpoint of latents in half, as versions before this one wrote."""
    model = proxbit.binarize(floats(num_hidden_layers=1)).to(dtype)
    model.save_pretrained(folder)
    return ViTForImageClassification.from_pretrained(folder)


def by_recipe(dtype, folder):
    """As `proxbit train` does."""
    half_floats(dtype).save_pretrained(folder)
    return ViTForImageClassification.from_pretrained(folder)


def made_half(dtype, folder):
    return proxbit.binarize(floats(num_hidden_layers=1)).to(dtype)


WAYS = [stored, asked_for, in_hand, latent_stored, by_recipe, made_half]


@pytest.mark.parametrize(
    ("way", "dtype"), [(way, (torch.bfloat16, torch.float16)[i % 2]) for i, way in enumerate(WAYS)]
)
def test_latents_are_trained_in_single_precision_whatever_the_model_is_in(tmp_path, crops, caplog, way, dtype):
    """Four steps that a latent of half would not feel move most of them; the rest of the model stays half."""
    model = way(dtype, tmp_path / "model")
    args = arguments(tmp_path, recipe="w1a32", max_steps=4, learning_rate=1e-6, per_device_train_batch_size=4)
    with caplog.at_level("WARNING", logger="proxbit"):
        trainer = ProxConnectTrainer(model=model, args=args, train_dataset=examples(crops, 4))
        before = {name: layer.weight.detach().clone() for name, layer in latent_layers(model)}
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "half precision" in record.getMessage()]
    assert len(said) == (way is made_half) and all("dtype=torch.float32, bf16=True" in each for each in said)
    kept = dict(trained_in_small_steps(model))
    assert {each.dtype for each in kept.values()} == {torch.float32}
    assert {each.dtype for name, each in model.named_parameters() if name not in kept} == {dtype}
    moved = [(layer.weight != before[name]).float().mean() for name, layer in latent_layers(model)]
    assert sum(moved) / len(moved) > 0.7
    assert {each.dtype for each in proxbit.pack(model).state_dict().values()} == {dtype, torch.uint8}


@pytest.mark.filterwarnings("ignore:Training ended soft")
def test_what_a_half_model_learns_is_what_a_single_one_learns(tmp_path):
    """Where mu is sharp, gradients of latents are below what fp16 holds: latents of fp16 learn nothing here (0.10)."""
    digits = load_digits()
    pixels, labels = torch.tensor(digits.images / 8 - 1)[:, None], digits.target.tolist()
    sizes = dict(image_size=8, patch_size=4, num_channels=1, hidden_size=32, intermediate_size=64, num_labels=10)

    def right(dtype):
        data = [{"pixel_values": x.to(dtype), "labels": y} for x, y in zip(pixels[:900], labels[:900], strict=True)]
        schedule = dict(mu_schedule="constant", mu_start=30.0, lr_scheduler_type="constant", hard_fraction=0)
        changes = dict(max_steps=32, learning_rate=3e-3, per_device_train_batch_size=64, max_grad_norm=0)
        args = arguments(tmp_path, **changes, **schedule)
        torch.manual_seed(0)
        model = proxbit.binarize(ViTForImageClassification(vit(initializer_range=0.2, **sizes)).to(dtype))
        ProxConnectTrainer(model=model, args=args, train_dataset=data[:512]).train()
        with torch.no_grad():
            found = model.eval()(pixels[512:900].to(dtype)).logits.argmax(-1)
        return float((found == torch.tensor(labels[512:900])).float().mean())

    single = right(torch.float32)
    assert single > 0.5 and right(torch.float16) == pytest.approx(single, abs=0.1)


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_in_half_rounds_no_latent(tmp_path, crops, name):
    model = make(num_hidden_layers=1)
    before = {name: each.detach().clone() for name, each in trained_in_small_steps(model)}
    args = arguments(tmp_path, per_device_eval_batch_size=4, **{name: True})
    ProxConnectTrainer(model=model, args=args, eval_dataset=examples(crops, 4)).evaluate()
    assert all(torch.equal(each, before[key]) for key, each in trained_in_small_steps(model))
    assert model.classifier.weight.dtype in (torch.bfloat16, torch.float16)


def test_a_half_model_resumes_with_all_digits_of_its_latents(tmp_path, crops):
    ends, data = [], examples(crops, 8)
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, per_device_train_batch_size=4, max_steps=4)
    for resumed in (None, str(tmp_path / "checkpoint-2")):
        model = proxbit.binarize(half_floats(torch.bfloat16))
        ProxConnectTrainer(model=model, args=args, train_dataset=data).train(resume_from_checkpoint=resumed)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


# --- less memory


@pytest.mark.parametrize("distil", [False, True], ids=["alone", "with teacher"])
def test_eight_small_batches_are_one_of_eight(tmp_path, crops, distil):
    """mu moves at every step and the last is hard. Twelve images: the last step of an epoch has fewer than eight.
    Gradients are not clipped, which would hide a wrong factor.
    """
    data = [{**item, "pixel_values": item["pixel_values"].double()} for item in examples(crops, 12)]
    weights, start = [], make().double().state_dict()
    for size, steps in ((8, 1), (1, 8)):
        model = make().double()
        args = arguments(
            tmp_path,
            optim="sgd",
            max_grad_norm=0,
            max_steps=4,
            learning_rate=0.02,
            hard_fraction=0.25,
            mu_start=0.5,
            mu_end=4.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        teacher = floats(2).double() if distil else None
        ProxConnectTrainer(model=model, args=args, train_dataset=data, teacher=teacher).train()
        weights.append(model.state_dict())
    assert max((weights[0][key] - value).abs().max().item() for key, value in start.items()) > 1e-2
    for key, value in weights[1].items():
        torch.testing.assert_close(value, weights[0][key], atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing_changes_no_gradient(crops, reentrant):
    inputs = batch(crops)
    model = make()
    _, expected = gradients(model, inputs)
    runs = []
    layer = model.get_submodule("vit.layers.0.mlp.fc1")
    layer.register_forward_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    _, found = gradients(model, inputs)
    assert len(runs) == 2
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_the_trainer_checkpoints_gradients(tmp_path, crops):
    weights = []
    for checkpointing in (False, True):
        model = make()
        args = arguments(tmp_path, max_steps=3, learning_rate=1e-2, gradient_checkpointing=checkpointing)
        ProxConnectTrainer(model=model, args=args, train_dataset=examples(crops, 8)).train()
        assert model.is_gradient_checkpointing == checkpointing
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], value) for key, value in weights[1].items())


# --- compilation


def test_a_latent_model_compiles_whole(crops):
    """Forward and backward are those of eager mode, and no graph is made again when mu moves."""
    torch.compiler.reset()
    model, inputs = make(num_hidden_layers=1), batch(crops)
    model.config.problem_type = "single_label_classification"  # transformers sets it in the first forward otherwise
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def step(function):
        model.zero_grad()
        loss = function(**inputs).loss
        loss.backward()
        return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    step(compiled)
    losses = []
    with torch.compiler.set_stance("fail_on_recompile"):
        for mu in (0.5, 8.0):
            set_mu(model, mu)
            (loss, found), (expected_loss, expected) = step(compiled), step(model)
            torch.testing.assert_close(loss, expected_loss)
            close(found, expected, 1e-4)
            losses.append(loss.item())
    assert len(set(losses)) == 2


def test_a_packed_model_compiles_whole(crops):
    torch.compiler.reset()
    model = make(packed=True).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        images = crops(4, SIDE)
        torch.testing.assert_close(compiled(images).logits, model(images).logits, atol=1e-5, rtol=1e-5)


# --- copies


def test_a_copy_trains_on_its_own(tmp_path, crops):
    model = make()
    model.get_submodule("vit.layers.1.mlp.fc2").soft_eval = True
    before, twin = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    images = crops(4, SIDE)
    with torch.no_grad():
        logits = model(images).logits
        assert torch.equal(twin(images).logits, logits)
    args = arguments(tmp_path, max_steps=3, learning_rate=1e-2)
    ProxConnectTrainer(model=twin, args=args, train_dataset=examples(crops, 8)).train()
    for (name, layer), (_, other) in zip(latent_layers(twin), latent_layers(model)):
        assert not torch.equal(layer.weight, other.weight), name
        assert layer.pair == other.pair
        assert (float(other.mu), other.hardened) == (2.0, False)
        assert float(layer.mu) == pytest.approx(30.0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model.train()(images).logits, logits)
