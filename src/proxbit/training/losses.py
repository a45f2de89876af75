"""Losses beside the task's own, and `DistillationLoss`, which adds those of a teacher to it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from proxbit.errors import ConfigError
from proxbit.training.arguments import check_distillation
from proxbit.training.recipes import DEFAULT_RECIPE, get_recipe

__all__ = ["DistillationLoss", "check_teacher", "distillation_loss", "gram_loss", "mixed_loss", "token_loss"]


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


# By the setting that weighs them.
_TOKEN_LOSSES = {"distillation_tokens": token_loss, "distillation_gram": gram_loss}
# What only the loss of a forward pass is for.
_OF_LOSS = ("labels", "num_items_in_batch")


class DistillationLoss:
    r"""For `compute_loss_func` of any Trainer: the task's loss, mixed with distillation from a teacher while training.

        Trainer(model, args, compute_loss_func=DistillationLoss(model, teacher), ...)

    Formula:
        (1 - distillation_weight) task + distillation_weight distillation_loss(logits)
        + distillation_tokens token_loss(tokens) + distillation_gram gram_loss(tokens),   tokens those of the last block

    The teacher is given what the model was last given: a hook on the model remembers it. Means over a batch count by
    its share of the labels in an optimizer step, so that accumulated batches add up to one large one.

    Args:
        model: the one that is trained, of which the Trainer may hold a wrapper.
        teacher: any model with the same labels, on the same device; it is put in evaluation mode.
        distillation_weight, distillation_temperature, distillation_tokens, distillation_gram: as the fields of
            `DistillationArguments`. None: the default of that field.
        task: the task's loss, of outputs, labels and `num_items_in_batch`, which it divides by. None: the
            `loss_function` of the model, as classifiers of transformers have it.

    Raises:
        ConfigError: as `DistillationTrainer`; by a call without labels.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        *,
        distillation_weight: float | None = None,
        distillation_temperature: float | None = None,
        distillation_tokens: float | None = None,
        distillation_gram: float | None = None,
        task: Callable[..., Tensor] | None = None,
    ) -> None:
        given = {
            "distillation_weight": distillation_weight,
            "distillation_temperature": distillation_temperature,
            "distillation_tokens": distillation_tokens,
            "distillation_gram": distillation_gram,
        }
        defaults = get_recipe(DEFAULT_RECIPE).training
        self.settings = {name: defaults[name] if value is None else value for name, value in given.items()}
        check_distillation(**self.settings)
        check_teacher(model, teacher, self.settings["distillation_weight"])
        if task is None and not callable(getattr(model, "loss_function", None)):
            raise ConfigError(f"{type(model).__name__} has no loss_function: pass the loss of the task, task=...")
        self.model, self.teacher, self.task = model, teacher.eval(), task
        self._inputs: dict[str, Any] = {}
        model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(
        self, model: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """As a hook of the model: remember its inputs, and ask for the tokens if they are compared."""
        if not model.training:
            return None
        self._inputs = asked(inputs, self.settings)
        return arguments, self._inputs

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of a batch, 0-dimensional."""
        if labels is None:
            raise ConfigError("DistillationLoss needs the labels of a batch: the Trainer found none in it.")
        if self.task is not None:
            loss = self.task(outputs, labels, num_items_in_batch=num_items_in_batch)
        else:
            model: Any = self.model
            loss = model.loss_function(labels, outputs.logits, model.config, num_items_in_batch=num_items_in_batch)
        inputs, self._inputs = self._inputs, {}
        if not self.model.training:
            return loss
        share = 1.0 if num_items_in_batch is None else (labels != -100).sum() / num_items_in_batch
        return mixed_loss(loss, outputs, inputs, self.teacher, self.settings, share)


def asked(inputs: dict[str, Any], settings: Mapping[str, float]) -> dict[str, Any]:
    """The inputs of a forward pass whose outputs hold what is compared."""
    return {**inputs, "output_hidden_states": True} if any(settings[name] for name in _TOKEN_LOSSES) else inputs


def mixed_loss(
    loss: Tensor,
    outputs: Any,
    inputs: Mapping[str, Any],
    teacher: nn.Module,
    settings: Mapping[str, float],
    share: Tensor | float = 1.0,
) -> Tensor:
    """The task's loss, mixed with what a teacher says of the same inputs.

    Args:
        loss: of the task.
        outputs: of the model that is trained.
        inputs: of the model; the teacher gets them without labels.
        teacher: in evaluation mode.
        settings: the weights and the temperature, named as the fields of `DistillationArguments`.
        share: of the batch in the optimizer step, by which means over the batch count.

    Raises:
        ConfigError: if one of the models does not give what is compared.
    """
    weight = settings["distillation_weight"]
    of_tokens = {name: function for name, function in _TOKEN_LOSSES.items() if settings[name]}
    if not weight and not of_tokens:
        return loss
    with torch.no_grad():
        taught = teacher(**{name: value for name, value in inputs.items() if name not in _OF_LOSS})
    if weight:
        logits = _of_both("logits", "distillation_weight", outputs, taught)
        distillation = distillation_loss(*logits, settings["distillation_temperature"])
        loss = (1 - weight) * loss + weight * share * distillation
    for name, function in of_tokens.items():
        student, tokens = _of_both("hidden_states", name, outputs, taught)
        loss = loss + settings[name] * share * function(student[-1], tokens[-1])
    return loss


def check_teacher(model: nn.Module | None, teacher: nn.Module | None, weight: float) -> None:
    """Check that a teacher can teach a model, as far as both are known.

    Raises:
        ConfigError: see `DistillationTrainer`.
    """
    if model is not None and teacher is not None:
        _check_apart(model, teacher)
    if not isinstance(model, PreTrainedModel) or not isinstance(teacher, PreTrainedModel):
        return
    if model.config.num_labels != teacher.config.num_labels:
        raise ConfigError(
            f"The teacher has {teacher.config.num_labels} labels, the model {model.config.num_labels}: "
            "distillation needs the same labels."
        )
    for who, each in {"model": model, "teacher": teacher}.items():
        other = _other_problem(each)
        if weight and other is not None:
            raise ConfigError(
                f"The {who} is one of {other}: distillation compares the probabilities of classes that exclude "
                f"each other, and says nothing there. Set distillation_weight to 0, not {weight:g}; "
                "distillation_tokens and distillation_gram work for such models too."
            )


def _check_apart(model: nn.Module, teacher: nn.Module) -> None:
    """Check that no parameter is the model's and the teacher's: the teacher would learn with the model."""
    own = {_place(parameter): name for name, parameter in model.named_parameters()}
    shared = [own[_place(parameter)] for parameter in teacher.parameters() if _place(parameter) in own]
    if shared:
        raise ConfigError(
            f"Model and teacher share {len(shared)} parameters, the first {shared[0]}: binarize works in place, so the "
            "teacher is the model, or has parts of it. Take a copy for the teacher, copy.deepcopy before binarize."
        )


def _place(parameter: nn.Parameter) -> int:
    """What two parameters have in common that share their numbers, which may be two objects."""
    plain = type(parameter.data) is Tensor and parameter.data_ptr()
    return plain or id(parameter)


def _of_both(name: str, argument: str, outputs: Any, taught: Any) -> tuple[Any, Any]:
    """An output of the model and of the teacher, which `argument` says to compare."""
    for who, each in {"model": outputs, "teacher": taught}.items():
        if each.get(name) is None:
            raise ConfigError(
                f"The {who} gives no {name}, only {', '.join(each)}: {argument} compares those of model and teacher. "
                f"Set {argument} to 0."
            )
    return outputs[name], taught[name]


def _other_problem(model: PreTrainedModel) -> str | None:
    """What a model does in the place of choosing one class among several; None where it does that."""
    problem: str | None = getattr(model.config, "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        return problem
    if type(model).__name__.endswith("ForPreTraining"):  # its logits are pixels, each model's of its own random masks
        return "reconstruction"
    # Of a single label a classification makes a regression, and a segmentation a yes or no; a detection adds "nothing".
    single = model.config.num_labels == 1
    heads = ("Classification", "SemanticSegmentation")
    return "a single label" if single and any(head in type(model).__name__ for head in heads) else None
