"""`DistillationTrainer`: the mixed loss by hand, the teacher left alone, models of any state."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    YolosForObjectDetection,
)

import proxbit
from proxbit.config import BinarizationConfig
from proxbit.errors import ConfigError
from proxbit.training import (
    DistillationArguments,
    DistillationTrainer,
    ProxConnectArguments,
    ProxConnectTrainer,
    gram_loss,
    token_loss,
)
from proxbit.training.losses import check_teacher
from tiny_models import FAMILIES, LABELS, SIDE, vit


def examples(crops, count):
    return [{"pixel_values": image, "labels": i % LABELS} for i, image in enumerate(crops(count, SIDE))]


def batch(crops, count=6):
    return {"pixel_values": crops(count, SIDE), "labels": torch.arange(count) % LABELS}


def sharp(seed):
    """A model whose predictions are far from uniform."""
    torch.manual_seed(seed)
    model = ViTForImageClassification(vit())
    nn.init.normal_(model.classifier.weight)
    return model


def arguments(folder, **changes):
    fixed = dict(report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no")
    training = dict(per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2)
    return DistillationArguments(str(folder), **(fixed | training | changes))


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def cross_entropy(logits, labels, count):
    return -log_softmax(logits)[np.arange(len(labels)), labels].sum() / count


def divergence(student, teacher, temperature, count):
    p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    return temperature**2 * (np.exp(p) * (p - q)).sum() / count


def by_hand(model, teacher, inputs, weight, temperature, count):
    with torch.no_grad():
        student = model(inputs["pixel_values"]).logits.double().numpy()
        target = teacher(inputs["pixel_values"]).logits.double().numpy()
    task = cross_entropy(student, inputs["labels"].numpy(), count)
    return (1 - weight) * task + weight * divergence(student, target, temperature, count)


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.3, 4.0), (1.0, 1.0)])
def test_the_loss_is_the_weighted_mix(tmp_path, crops, weight, temperature):
    """A mean over the batch; in a step of four batches a part of the mean over the step."""
    model, teacher, inputs = sharp(1), sharp(2), batch(crops)
    args = arguments(tmp_path, distillation_weight=weight, distillation_temperature=temperature)
    trainer = DistillationTrainer(model=model, args=args, teacher=teacher)
    loss, outputs = trainer.compute_loss(model.train(), dict(inputs), return_outputs=True)
    assert loss.item() == pytest.approx(by_hand(model, teacher, inputs, weight, temperature, 6), rel=1e-4)
    assert outputs.logits.shape == (6, LABELS)
    batches, items = trainer.get_batch_samples(iter([inputs] * 4), 4, args.device)
    part = trainer.training_step(model, batches[0], items)
    assert part.item() == pytest.approx(by_hand(model, teacher, inputs, weight, temperature, 24), rel=1e-4)
    assert trainer.compute_loss(model, dict(inputs)).item() == loss.item()


def test_the_defaults_are_one_half_at_temperature_two(tmp_path, crops):
    model, teacher, inputs = sharp(1), sharp(2), batch(crops)
    trainer = DistillationTrainer(model=model, args=arguments(tmp_path), teacher=teacher)
    expected = by_hand(model, teacher, inputs, 0.5, 2.0, 6)
    assert trainer.compute_loss(model.train(), inputs).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mode", ["evaluation", "no teacher"])
def test_otherwise_the_loss_is_that_of_the_task(tmp_path, crops, mode):
    model, inputs = sharp(1), batch(crops)
    teacher = sharp(2) if mode == "evaluation" else None
    trainer = DistillationTrainer(model=model, args=arguments(tmp_path), teacher=teacher)
    loss = trainer.compute_loss(model.train(mode != "evaluation"), inputs)
    with torch.no_grad():
        logits = model(inputs["pixel_values"]).logits.double().numpy()
    assert loss.item() == pytest.approx(cross_entropy(logits, inputs["labels"].numpy(), 6), rel=1e-4)


def test_the_teacher_is_left_alone(tmp_path, crops):
    """In evaluation mode all along, without gradients, and with the weights that it came with."""
    model, teacher = sharp(1), sharp(2).train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = DistillationTrainer(
        model=model, args=arguments(tmp_path), teacher=teacher, train_dataset=examples(crops, 8)
    )
    assert trainer.teacher is teacher and not any(module.training for module in teacher.modules())
    trainer.train()
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_other_labels_are_refused(tmp_path):
    teacher = ViTForImageClassification(vit(num_labels=LABELS + 2))
    with pytest.raises(ConfigError, match="The teacher has 5 labels, the model 3: distillation needs the same labels"):
        DistillationTrainer(model=sharp(1), args=arguments(tmp_path / "out"), teacher=teacher)
    assert list(tmp_path.iterdir()) == []


REGRESSION = vit(num_labels=1)
MULTI_LABEL = vit(problem_type="multi_label_classification")


@pytest.mark.parametrize(
    ("student", "taught", "words"),
    [
        (REGRESSION, REGRESSION, "The model is one of a single label"),
        (vit(problem_type="regression"), vit(), "The model is one of regression"),
        (MULTI_LABEL, MULTI_LABEL, "The model is one of multi_label_classification"),
        (vit(), MULTI_LABEL, "The teacher is one of multi_label_classification"),
    ],
)
def test_what_is_no_choice_among_classes_is_not_distilled(tmp_path, crops, student, taught, words):
    """Its tokens may be."""
    model, teacher = ViTForImageClassification(student), ViTForImageClassification(taught)
    with pytest.raises(ConfigError, match=f"{words}: .* Set distillation_weight to 0, not 0.5; distillation_tokens"):
        DistillationTrainer(model=model, args=arguments(tmp_path / "out"), teacher=teacher)
    assert list(tmp_path.iterdir()) == []
    inputs = {"pixel_values": crops(4, SIDE), "labels": torch.randn(4, student.num_labels)}
    if student.problem_type is None and student.num_labels > 1:
        inputs["labels"] = torch.arange(4) % LABELS
    losses = []
    for tokens in (0.0, 1.0):
        args = arguments(tmp_path, distillation_weight=0.0, distillation_tokens=tokens)
        trainer = DistillationTrainer(model=model, args=args, teacher=teacher)
        losses.append(trainer.compute_loss(model.train(), dict(inputs)).item())
    assert losses[1] > losses[0]


def test_pixels_are_no_classes(tmp_path):
    sizes = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    models = [ViTMAEForPreTraining(ViTMAEConfig(**vit().to_diff_dict() | sizes)) for _ in range(2)]
    with pytest.raises(ConfigError, match="The model is one of reconstruction: distillation compares"):
        DistillationTrainer(model=models[0], args=arguments(tmp_path / "out"), teacher=models[1])


@pytest.mark.parametrize("field", ["distillation_weight", "distillation_tokens", "distillation_gram"])
def test_only_what_both_give_is_compared(tmp_path, crops, field):
    """A model of masked images gives hidden states, and no logits; this teacher gives neither."""

    class Silent(nn.Module):
        def forward(self, **inputs):
            return {"pixels": inputs["pixel_values"]}

    weights = {"distillation_weight": 0.0} | {field: 0.5}
    masked = ViTForMaskedImageModeling(vit(encoder_stride=8))
    inputs = {"pixel_values": batch(crops)["pixel_values"]}
    inputs["bool_masked_pos"] = torch.arange(masked.vit.embeddings.patch_embeddings.num_patches).expand(6, -1) % 2
    for teacher, who in ((copy.deepcopy(masked), "model"), (Silent(), "teacher")):
        model = sharp(1) if who == "teacher" else masked
        given = batch(crops) if who == "teacher" else inputs
        trainer = DistillationTrainer(model=model, args=arguments(tmp_path, **weights), teacher=teacher)
        if who == "model" and field != "distillation_weight":
            assert trainer.compute_loss(model.train(), given).item() > 0
            continue
        with pytest.raises(ConfigError, match=f"The {who} gives no .*, only .*: {field} compares .* Set {field} to 0"):
            trainer.compute_loss(model.train(), given)


def test_a_teacher_that_is_not_asked_does_nothing(tmp_path, crops):
    model, teacher = sharp(1), sharp(2)
    teacher.forward = lambda **inputs: pytest.fail("asked")
    trainer = DistillationTrainer(model=model, args=arguments(tmp_path, distillation_weight=0.0), teacher=teacher)
    assert trainer.compute_loss(model.train(), batch(crops)).item() > 0


def test_one_kind_of_object_is_distilled():
    """A detection has a class more than labels."""
    config = FAMILIES["yolos"]().config
    config.num_labels = 1
    model = YolosForObjectDetection(config)
    check_teacher(model, copy.deepcopy(model), weight=0.5)


def same_object(model):
    return model


def tied(model):
    other = copy.deepcopy(model)
    other.classifier.weight = model.classifier.weight
    return other


def same_numbers(model):
    """Other parameters that lie in the same memory."""
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def part_of_it(model):
    """Beside what is taught, in one module."""
    teacher = copy.deepcopy(model)
    model.add_module("taught_by", teacher)
    return teacher


@pytest.mark.parametrize(
    ("teacher_of", "binary"),
    [(same_object, True), (copy.copy, False), (tied, True), (same_numbers, False), (part_of_it, True)],
)
def test_a_teacher_that_learns_with_the_model_is_refused(tmp_path, teacher_of, binary):
    """`binarize` works in place: the teacher that is not copied before is the student."""
    model = sharp(1)
    teacher = teacher_of(model)
    kind, args = DistillationTrainer, arguments(tmp_path)
    if binary:
        model, kind, args = proxbit.binarize(model), ProxConnectTrainer, ProxConnectArguments(str(tmp_path))
    with pytest.raises(ConfigError, match=r"share \d+ parameters, the first .*: .*copy.deepcopy before binarize"):
        kind(model=model, args=args, teacher=teacher)


def test_a_copy_teaches(tmp_path, crops):
    """Also a copy of a teacher that was binarized itself; and without parameters there is nothing to share."""
    teacher = sharp(1)
    student = proxbit.binarize(copy.deepcopy(teacher))
    for each in (teacher, copy.deepcopy(student), nn.Identity()):
        DistillationTrainer(model=student, args=arguments(tmp_path), teacher=each)


def test_arguments_of_transformers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"args are TrainingArguments: .* takes DistillationArguments of"):
        DistillationTrainer(sharp(1), TrainingArguments(str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("binary", [False, True], ids=["float", "latent"])
def test_a_student_comes_nearer_to_its_teacher(tmp_path, crops, binary):
    """With all weight on the teacher, labels do not matter; predictions follow the teacher's."""
    images = crops(8, SIDE)
    model, teacher = sharp(1), sharp(2)
    if binary:
        proxbit.binarize(model, BinarizationConfig())
    data = [{"pixel_values": image, "labels": 0} for image in images]
    args = arguments(
        tmp_path, distillation_weight=1.0, max_steps=15, per_device_train_batch_size=8, lr_scheduler_type="constant"
    )

    def distance():
        with torch.no_grad():
            student, target = (m(images).logits.double().numpy() for m in (model.train(), teacher))
        return divergence(student, target, 1.0, 8)

    before = distance()
    DistillationTrainer(model=model, args=args, teacher=teacher, train_dataset=data).train()
    assert distance() < 0.3 * before


def test_without_a_teacher_it_is_the_plain_trainer(tmp_path, crops):
    weights = []
    for kind in (Trainer, DistillationTrainer):
        model = sharp(1)
        kind(model=model, args=arguments(tmp_path), train_dataset=examples(crops, 8)).train()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], value) for key, value in weights[1].items())


@pytest.mark.parametrize("distil", [False, True], ids=["alone", "with teacher"])
def test_eight_small_batches_are_one_of_eight(tmp_path, crops, distil):
    """Twelve images in batches of eight: the last step of an epoch has fewer, and still is their mean. Gradients are
    not clipped, which would hide a wrong factor.
    """
    data = [{**item, "pixel_values": item["pixel_values"].double()} for item in examples(crops, 12)]
    weights, start = [], sharp(1).double().state_dict()
    for size, steps in ((8, 1), (1, 8)):
        model = sharp(1).double()
        args = arguments(
            tmp_path,
            optim="sgd",
            max_grad_norm=0,
            max_steps=4,
            learning_rate=0.05,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        teacher = sharp(2).double() if distil else None
        DistillationTrainer(model=model, args=args, teacher=teacher, train_dataset=data).train()
        weights.append(model.state_dict())
    assert max((weights[0][key] - value).abs().max().item() for key, value in start.items()) > 1e-2
    for key, value in weights[1].items():
        torch.testing.assert_close(value, weights[0][key], atol=1e-6, rtol=0)


class Penalized(DistillationTrainer):
    def penalty(self):
        return self.model.classifier.weight.square().sum()


EVERYTHING = dict(distillation_tokens=0.3, distillation_gram=0.7)


def after(folder, kind, model, teacher, data, size, steps, **changes):
    """The weights after two steps of gradient descent on `steps` batches of `size`."""
    training = dict(optim="sgd", max_grad_norm=0, max_steps=2, learning_rate=0.05, lr_scheduler_type="constant")
    sizes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
    options = {name: changes.pop(name) for name in ("compute_loss_func",) if name in changes}
    args = arguments(folder, **training, **sizes, **changes)
    model = copy.deepcopy(model)
    kind(model=model, args=args, teacher=teacher, train_dataset=data, **options).train()
    return model.state_dict()


def assert_same(first, second, start):
    assert max((first[key] - value).abs().max().item() for key, value in start.items()) > 1e-3
    for key, value in second.items():
        torch.testing.assert_close(value, first[key], atol=1e-9, rtol=0, msg=key)


def in_double(count, crops, labels=None):
    return [
        {"pixel_values": x.double(), "labels": i % LABELS if labels is None else labels[i]}
        for i, x in enumerate(crops(count, SIDE))
    ]


@pytest.mark.parametrize(
    ("family", "own", "size"),
    [
        ("vit", False, 1),
        ("vit", False, 5),
        ("vit", True, 1),
        ("vit", True, 5),
        ("convnext", False, 1),
        ("convnext", True, 1),
        ("convnext", True, 5),
    ],
)
def test_whatever_is_added_is_a_mean_over_the_step(tmp_path, crops, family, own, size):
    """Of all its samples: ConvNeXt is not told their number, but a loss function is, and the Trainer divides what
    neither knows by the number of batches, which is right for equal ones.
    """

    def summed(outputs, labels, num_items_in_batch):
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    model, teacher = (FAMILIES[family]().double() for _ in range(2))
    nn.init.normal_(teacher.classifier.weight)
    changes = EVERYTHING | (dict(compute_loss_func=summed) if own else {})
    data = in_double(8, crops)
    whole = after(tmp_path, Penalized, model, teacher, data, 8, 1, **changes)
    parts = after(tmp_path, Penalized, model, teacher, data, size, -(-8 // size), **changes)
    assert_same(whole, parts, model.state_dict())


def test_pictures_without_labels_are_weighed_too(tmp_path, crops):
    """Their number is not known to the loss function, which has nothing to say."""
    model, teacher = sharp(1).double(), sharp(2).double()
    data = [{"pixel_values": x.double()} for x in crops(8, SIDE)]
    nothing = dict(compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum() * 0)
    whole, parts = (after(tmp_path, DistillationTrainer, model, teacher, data, n, 8 // n, **nothing) for n in (8, 1))
    assert_same(whole, parts, model.state_dict())


def segmenting(seed):
    """Without what sees the whole batch or is random."""
    torch.manual_seed(seed)
    config = FAMILIES["segformer"]().config
    config.classifier_dropout_prob = config.drop_path_rate = 0.0
    model = type(FAMILIES["segformer"]())(config).double()
    model.decode_head.batch_norm = nn.Identity()
    nn.init.normal_(model.decode_head.classifier.weight, std=20)
    return model


def test_segmentation_is_distilled_over_the_classes_of_each_position(tmp_path, crops):
    """Logits are maps, of fewer positions than labels have pixels."""
    model, teacher = segmenting(1), segmenting(2)
    data = in_double(8, crops, torch.randint(LABELS, (8, SIDE, SIDE)))
    pixels = torch.stack([each["pixel_values"] for each in data])
    with torch.no_grad():
        maps = [each(pixels).logits.permute(0, 2, 3, 1).reshape(-1, LABELS).numpy() for each in (model, teacher)]
    assert len(maps[0]) == 8 * 8 * 8
    args = arguments(tmp_path, distillation_weight=1.0)
    inputs = {"pixel_values": pixels, "labels": torch.stack([each["labels"] for each in data])}
    loss = DistillationTrainer(model=model, args=args, teacher=teacher).compute_loss(model.train(), inputs)
    assert loss.item() == pytest.approx(divergence(*maps, 2.0, len(maps[0])), rel=1e-6)
    whole, parts = (
        after(tmp_path, DistillationTrainer, model, teacher, data, n, 8 // n, distillation_weight=1.0) for n in (8, 1)
    )
    assert_same(whole, parts, model.state_dict())


@pytest.mark.parametrize(
    ("field", "function", "accumulate"),
    [("distillation_tokens", token_loss, 2), ("distillation_gram", gram_loss, 1), ("distillation_gram", gram_loss, 2)],
)
def test_tokens_of_the_last_block_add_to_the_loss(field, function, accumulate, crops, tmp_path):
    """With accumulation each batch counts for its part: the sum over two halves is the whole."""
    model, teacher, inputs = sharp(0).eval(), sharp(1), batch(crops, 8)
    losses = []
    for weight in (0.0, 0.7):
        torch.manual_seed(0)
        training = arguments(
            tmp_path,
            gradient_accumulation_steps=accumulate,
            per_device_train_batch_size=8 // accumulate,
            max_steps=1,
            learning_rate=1e-12,
            logging_strategy="steps",
            logging_steps=1,
            **{field: weight},
        )
        trainer = DistillationTrainer(
            model=copy.deepcopy(model), teacher=teacher, args=training, train_dataset=examples(crops, 8)
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    with torch.no_grad():
        last = [
            each(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1]
            for each in (model, teacher.eval())
        ]
    assert losses[1] - losses[0] == pytest.approx(0.7 * float(function(*last)), rel=0.1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("distillation_tokens", -0.1), ("distillation_gram", float("inf")), ("distillation_tokens", float("nan"))],
)
def test_weights_of_token_losses_are_finite_and_not_negative(name, value, tmp_path):
    with pytest.raises(ConfigError, match=f"{name} must be finite and not negative, not {value}"):
        arguments(tmp_path, **{name: value})
