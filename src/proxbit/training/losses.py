"""Losses beside the task's own."""

import torch
from torch import Tensor

__all__ = ["distillation_loss"]


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, num_items: Tensor | int | None = None
) -> Tensor:
    r"""The distance of the student's softened predictions from the teacher's.

    Formula:
        T^2 \sum_b KL( softmax(teacher_b / T) || softmax(student_b / T) ) / n

    Args:
        student: logits, `[B, C]` (or `[B, N, C]`: every position counts as an item).
        teacher: logits, same shape; no gradient flows to them.
        temperature: T > 0.
        num_items: n; None for the number of items in this batch. With gradient accumulation it is the number of items
            in all batches of the step.

    Returns:
        0-dimensional, single precision or better.

    Raises:
        ValueError: if the shapes differ.

    Source:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, section 2,
        https://huggingface.co/papers/1503.02531
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The teacher's logits are {list(teacher.shape)}, the student's {list(student.shape)}: both models must be "
            "trained for the same labels."
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    student_log = torch.log_softmax(student.to(dtype) / temperature, dim=-1).flatten(0, -2)
    teacher_log = torch.log_softmax(teacher.detach().to(dtype) / temperature, dim=-1).flatten(0, -2)
    divergence = torch.nn.functional.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
    return divergence * temperature**2 / (len(student_log) if num_items is None else num_items)
