"""Losses beside the task's own."""

import torch
from torch import Tensor

__all__ = ["distillation_loss", "gram_loss", "token_loss"]


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""The distance of the student's softened predictions from the teacher's.

    Formula:
        T^2 / n \sum_b KL( softmax(teacher_b / T) || softmax(student_b / T) )

    Args:
        student: logits, `[B, C]`, or `[B, N, C]` and maps `[B, C, h, w]` of segmentation, where a position is an item.
        teacher: logits, same shape; no gradient flows to them.
        temperature: T > 0.

    Returns:
        The mean over the n items, 0-dimensional, single precision or better.

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
    student_log, teacher_log = (
        torch.log_softmax(_tokens(x) / temperature, dim=-1).flatten(0, -2) for x in (student, teacher.detach())
    )
    divergence = torch.nn.functional.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def _tokens(features: Tensor) -> Tensor:
    """Maps `[B, C, h, w]` of features or logits as tokens, in at least single precision."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features


def token_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""The squared distance of the tokens of two models, each token normalized to mean 0 and variance 1.

    Formula:
        mean_{b,n,c} (N(student) - N(teacher))^2,   N(x) = (x - mean x) / std x over c

    Args:
        student: `[B, N, C]`, or feature maps `[B, C, h, w]`.
        teacher: same shape; no gradient flows to it.

    Returns:
        0-dimensional, single precision or better.

    Raises:
        ValueError: if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The teacher's tokens are {list(teacher.shape)}, the student's {list(student.shape)}: distillation_tokens "
            "needs models of the same width and number of tokens; distillation_gram of the same number of tokens."
        )
    a, b = (torch.nn.functional.layer_norm(x, x.shape[-1:]) for x in (_tokens(student), _tokens(teacher.detach())))
    return (a - b).square().mean()


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""The distance of the similarities between tokens, for models of any width.

    Formula:
        mean_b || G(student_b) - G(teacher_b) ||_F^2 / N^2,   G(x) = X X^T, rows of X the tokens of length 1

    Args:
        student: `[B, N, C]`, or feature maps `[B, C, h, w]`.
        teacher: `[B, N, C']`; no gradient flows to it.

    Returns:
        0-dimensional, single precision or better.

    Raises:
        ValueError: if the numbers of tokens differ.

    Source:
        Li et al., Bi-ViT, AAAI 2024, and Qin et al., BiBERT, ICLR 2022, which match such matrices of queries, keys and
        values; here they are of the tokens of the last block.
    """
    a, b = (torch.nn.functional.normalize(_tokens(x), dim=-1) for x in (student, teacher.detach()))
    if a.shape[:2] != b.shape[:2]:
        raise ValueError(
            f"The teacher has {b.shape[1]} tokens, the student {a.shape[1]}: distillation_gram needs as many."
        )
    return (a @ a.transpose(1, 2) - b @ b.transpose(1, 2)).square().mean()
