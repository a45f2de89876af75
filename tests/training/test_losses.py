"""The distillation loss against a Kullback-Leibler divergence in numpy."""

import numpy as np
import pytest
import torch

from proxbit.training import distillation_loss, gram_loss, token_loss


def softmax(logits, temperature):
    powers = np.exp(logits / temperature - (logits / temperature).max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def divergence(student, teacher, temperature, count):
    """T^2 sum KL(teacher || student) / count, over `[items, classes]`."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return temperature**2 * (p * (np.log(p) - np.log(q))).sum() / count


def logits(*shape, seed=0):
    return 3 * np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_it_is_the_divergence_from_the_teacher(temperature):
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    loss = distillation_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(divergence(student, teacher, temperature, 6), rel=1e-5)


def test_the_direction_is_from_teacher_to_student():
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    assert divergence(student, teacher, 2, 6) != pytest.approx(divergence(teacher, student, 2, 6), rel=0.05)
    loss = distillation_loss(torch.tensor(student), torch.tensor(teacher), 2.0)
    assert loss.item() != pytest.approx(divergence(teacher, student, 2, 6), rel=0.05)


def test_it_is_zero_for_equal_predictions():
    """A constant added to all logits of an item changes no prediction."""
    student = torch.tensor(logits(4, 3))
    assert distillation_loss(student, student + 7, 2.0).item() == pytest.approx(0, abs=1e-6)
    assert distillation_loss(student, student.flip(1), 2.0).item() > 0.01


def test_every_position_is_an_item():
    student, teacher = logits(2, 4, 5), logits(2, 4, 5, seed=1)
    loss = distillation_loss(torch.tensor(student), torch.tensor(teacher), 2.0)
    assert loss.item() == pytest.approx(divergence(student, teacher, 2, 2 * 4), rel=1e-5)


def test_the_classes_of_maps_are_their_channels():
    """What a segmentation model gives: `[B, C, h, w]`, here with as many classes as pixels in a row, too."""
    for shape in ((2, 5, 3, 4), (2, 4, 3, 4)):
        student, teacher = logits(*shape), logits(*shape, seed=1)
        rows = [np.moveaxis(x, 1, -1).reshape(-1, shape[1]) for x in (student, teacher)]
        loss = distillation_loss(torch.tensor(student), torch.tensor(teacher), 2.0)
        assert loss.item() == pytest.approx(divergence(*rows, 2, 2 * 3 * 4), rel=1e-5)
    shifted = student + 5 * logits(2, 1, 3, 4, seed=2)
    assert distillation_loss(torch.tensor(shifted), torch.tensor(student), 2.0).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_goes_to_the_student_only(temperature):
    """d loss / d student = T (softmax(student / T) - softmax(teacher / T)) / n."""
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    learns = torch.tensor(student, requires_grad=True)
    teaches = torch.tensor(teacher, requires_grad=True)
    distillation_loss(learns, teaches, temperature).backward()
    expected = temperature * (softmax(student, temperature) - softmax(teacher, temperature)) / 6
    np.testing.assert_allclose(learns.grad.numpy(), expected, atol=1e-6)
    assert teaches.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_a_single_precision_loss(dtype):
    student, teacher = torch.tensor(logits(6, 5)).to(dtype), torch.tensor(logits(6, 5, seed=1)).to(dtype)
    loss = distillation_loss(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(divergence(student.double().numpy(), teacher.double().numpy(), 2, 6), rel=1e-5)


def test_double_precision_logits_give_a_double_precision_loss():
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    loss = distillation_loss(torch.tensor(student), torch.tensor(teacher), 2.0)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(divergence(student, teacher, 2, 6), rel=1e-12)


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = distillation_loss(student, -student.detach(), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("shape", [(6, 4), (5, 5), (6, 1, 5)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="the student's \\[6, 5\\]: both models must be trained for the same labels"):
        distillation_loss(torch.zeros(6, 5), torch.zeros(shape), 2.0)


def test_tokens_are_compared_in_units_of_their_own():
    student, teacher = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    a, b = (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        for x in (student, teacher)
    )
    torch.testing.assert_close(token_loss(student, teacher), ((a - b) ** 2).mean())
    assert float(token_loss(3 * student + 1, student)) == pytest.approx(0, abs=1e-9)


def test_gram_matrices_do_not_depend_on_the_width():
    student, teacher = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    total = 0.0
    for x, y in zip(student, teacher, strict=True):
        for i in range(5):
            for j in range(5):
                cosines = [torch.nn.functional.cosine_similarity(z[i], z[j], dim=0) for z in (x, y)]
                total += float(cosines[0] - cosines[1]) ** 2
    assert float(gram_loss(student, teacher)) == pytest.approx(total / 50)
    assert float(gram_loss(student @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0], student)) < 1e-20


@pytest.mark.parametrize("loss", [token_loss, gram_loss])
def test_feature_maps_are_tokens_and_only_the_student_learns(loss):
    maps = [torch.randn(2, 4, 3, 3, requires_grad=True) for _ in range(2)]
    value = loss(*maps)
    torch.testing.assert_close(value, loss(*(x.flatten(2).transpose(1, 2) for x in maps)))
    value.backward()
    assert maps[0].grad.abs().sum() > 0 and maps[1].grad is None
    assert loss(maps[0].bfloat16(), maps[1].bfloat16()).dtype == torch.float32


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match="distillation_tokens needs models of the same width"):
        token_loss(torch.randn(2, 5, 8), torch.randn(2, 5, 3))
    with pytest.raises(ValueError, match="The teacher has 4 tokens, the student 5"):
        gram_loss(torch.randn(2, 5, 8), torch.randn(2, 4, 8))
