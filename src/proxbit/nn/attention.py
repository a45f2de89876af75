"""Attention on int8 and on binary operands, as functions that transformers calls instead of its own.

They take what its attention functions take, and treat masks, dropout and grouped keys like `sdpa`. Products are sums of
whole numbers; softmax is computed on floats. Gradients pass straight through the rounding; those of signs are the B of
a pair.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.nn.activation_quantizer import DEFAULT_ACTIVATION_PAIR, Total
from proxbit.nn.activations import fitted_upper_level, upper_level
from proxbit.nn.learned import SMALLEST, Learned, lsq_scale
from proxbit.nn.recompute import is_plain, recompute
from proxbit.nn.surrogate import binarize_units, clip, straight_through
from proxbit.quantizers import get_pair
from proxbit.sign import reaches, sign

__all__ = [
    "ATTENTIONS",
    "BINARY",
    "LEARNED_SCALE",
    "Attention",
    "BinaryProbabilities",
    "binary_attention",
    "float_attention",
    "int8_attention",
]

BINARY = "proxbit_binary"
# The `BinaryProbabilities` of an attention module, if it has any.
LEARNED_SCALE = "binary_probabilities"

_SMALLEST = 1e-30

Codes = tuple[Tensor, Tensor]
OfProbabilities = Callable[[Tensor], Codes] | None

_in_floats: ContextVar[bool] = ContextVar("proxbit_float_attention", default=False)


@contextmanager
def float_attention() -> Iterator[None]:
    """Within the context, in this thread, attention on quantized operands computes with floats instead."""
    token = _in_floats.set(True)
    try:
        yield
    finally:
        _in_floats.reset(token)


def even_share(probabilities: Tensor) -> Tensor:
    """1 / n of each row, `[..., 1]`: what each of the n keys that a query can see has if all have the same."""
    return probabilities.detach().clone().gt_(0).sum(dim=-1, keepdim=True).clamp(min=1).reciprocal()


def binarize_probabilities(probabilities: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`BinaryProbabilities` with this scale."""
    size = lsq_scale(scale, probabilities.shape[-1]).to(probabilities.dtype) * even_share(probabilities)
    units = clip(probabilities / size, 0, 1)
    return straight_through(reaches(probabilities, size.detach() / 2), units), size


class BinaryProbabilities(Learned):
    r"""Zero or a learned multiple of the even share 1 / n, where n is the number of keys that the query can see.

    Formula:
        p = 1[P \ge s_p / 2],   s_p = scale / n

    Backward, of p s_p: to P straight through where P \le s_p, else 0; to the scale (p - P / s_p) / n there, else 1 / n,
    times 1 / \sqrt{K}.

    Args:
        **kind: device and dtype of the parameter.

    Attributes:
        scale: `[1]`, 2 at first: keys with at least their even share.

    Source:
        Liu et al., BiT: Robustly Binarized Multi-distilled Transformer, NeurIPS 2022, section 2.2, equation of the
        elastic binarization of non-negative activations. Differs from it in: the scale is in units of the even share,
        so that it fits any number of keys, and nothing is taken off before.
    """

    def __init__(self, **kind: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1, **kind))
        self.calibrated = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.scale.fill_(2.0)

    def calibrate(self, rows: Sequence[Tensor]) -> None:
        """Set the scale to the least-squares one of some probabilities, each `[..., K]`."""
        units = torch.cat([(row / even_share(row)).flatten() for row in rows])
        with torch.no_grad():
            self.scale.fill_(max(upper_level(units, 2.0), SMALLEST))

    def fit(self, total: Total) -> None:
        """Likewise, of probabilities that come in parts, see `ActivationQuantizer.fit`."""
        units = fitted_upper_level(lambda function: total(lambda rows: function(rows / even_share(rows))))
        with torch.no_grad():
            self.scale.fill_(max(units, SMALLEST))

    def forward(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize.

        Args:
            probabilities: `[..., K]`, fp32 or fp64; of masked keys zero.

        Returns:
            p, `[..., K]`, and s_p, `[..., 1]`.
        """
        return binarize_probabilities(probabilities, self.scale)


def _rounded(x: Tensor, step: Tensor, peak: int) -> Tensor:
    """x / step as a whole number up to `peak`; the gradient passes straight."""
    units = x / step.clamp(min=_SMALLEST)
    return straight_through(units.detach().round().clamp_(-peak, peak), units)


def _int8(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes and their step, by the largest along `dim`."""
    step = x.detach().abs().amax(dim=dim, keepdim=True) / 127
    return _rounded(x, step, 127), step


def _signs(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Signs, and the mean size along `dim`."""
    size = x.abs().mean(dim=dim, keepdim=True)
    pair = get_pair(DEFAULT_ACTIVATION_PAIR)
    units = x / size.detach().clamp(min=_SMALLEST)
    return binarize_units(units, sign(x), torch.tensor(pair.schedule[1], dtype=torch.float64), pair), size


def _masked_softmax(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    if mask is None and not is_causal:
        return scores.softmax(dim=-1)
    if is_causal:
        length, keys = scores.shape[-2:]
        future = torch.ones(length, keys, dtype=torch.bool, device=scores.device).triu(keys - length + 1)
        scores = scores.masked_fill(future, -torch.inf)
    if mask is not None:
        mask = mask[..., : scores.shape[-1]]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    probabilities = scores.softmax(dim=-1)
    # Of a query that may look at nothing, sdpa gives zeros.
    nothing = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return probabilities.masked_fill(nothing, 0.0)


def _uint8(probabilities: Tensor, learned: OfProbabilities) -> Codes:
    step = probabilities.detach().amax(dim=-1, keepdim=True) / 255
    return _rounded(probabilities, step, 255), step


def _zero_or_one(probabilities: Tensor, learned: OfProbabilities) -> Codes:
    """As it was learned; else 1 where a key has its even share of the probability, and the mean of those."""
    if learned is not None:
        return learned(probabilities)
    share = even_share(probabilities)
    is_one = reaches(probabilities, share)
    # Units of an elastic quantizer whose upper level is twice the even share.
    size = (probabilities * is_one).sum(dim=-1, keepdim=True) / is_one.sum(dim=-1, keepdim=True).clamp(min=1)
    return straight_through(is_one, clip(probabilities / (2 * share), 0, 1)), size


def _of_every_row(tensor: Tensor, batch: int) -> Tensor:
    """A mask or a bias with as many rows as the batch; no copy."""
    return tensor.expand(batch, *tensor.shape[1:])


def _in_blocks(
    attend: Callable[..., Codes], learned: BinaryProbabilities | None, tensors: tuple[Tensor, ...], width: int
) -> Codes:
    """`attend(learned, *tensors)`, for some images at a time."""
    if is_plain():
        return attend(learned, *tensors)
    if learned is None:
        made = recompute(partial(attend, None), width, (), tensors)
    else:

        def by_scale(scale: Tensor, *rest: Tensor) -> Codes:
            return attend(partial(binarize_probabilities, scale=scale), *rest)

        made = recompute(by_scale, width, (learned.scale,), tensors)
    return made[0], made[1]


@dataclass(frozen=True)
class Attention:
    r"""Attention on whole numbers, as a function with the arguments of transformers' own.

    Formula:
        S = (q k^T) s_q s_k scaling,   P = softmax(S + mask),   O = (p v) s_p s_v
        q s_q, k s_k: token by token; v s_v: channel by channel; p s_p: row by row

    Args:
        quantize: `(x, dim) -> whole numbers, their size along dim`, for queries, keys and values.
        quantize_probabilities: likewise of P along its rows, `(P, as the module learned it, or None)`.
    """

    quantize: Callable[[Tensor, int], Codes]
    quantize_probabilities: Callable[[Tensor, OfProbabilities], Codes]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            module: of the attention; its `training`, `is_causal` and `num_key_value_groups` are read, and by a binary
                attention its learned scale, if it has one.
            query: `[B, H, L, D]`.
            key: `[B, H / groups, K, D]`.
            value: `[B, H / groups, K, D]`.
            attention_mask: `[B or 1, H or 1, L or 1, K]`, boolean (True may be looked at) or added to the scores; or
                None.
            dropout: share of the probabilities that are dropped in training.
            scaling: of the scores; None for 1 / sqrt(D).
            is_causal: whether later keys are masked where there is no mask; None for what the module says.
            position_bias: added to the scores, `[B or 1, H, L, K]`; or None.
            **kwargs: not used.

        Returns:
            `[B, L, H, D]`, and the quantized probabilities, `[B, H, L, K]`.
        """
        groups = int(getattr(module, "num_key_value_groups", 1))
        dtype = query.dtype
        # In fp32 sums of whole numbers are exact up to 2^24: int8 rows of 1,040, and 518 keys.
        query, key, value = (x if dtype == torch.float64 else x.float() for x in (query, key, value))
        key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
        is_causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
        is_causal = query.shape[2] > 1 and attention_mask is None and is_causal
        in_floats = not torch.compiler.is_compiling() and _in_floats.get()
        learned = None if in_floats else getattr(module, LEARNED_SCALE, None)
        learned = learned if isinstance(learned, BinaryProbabilities) else None
        batch, heads, length, _ = query.shape
        shape = (batch, heads, length, key.shape[2])
        extras = {"mask": attention_mask, "bias": position_bias}
        if dropout and module.training:
            extras["kept"] = nn.functional.dropout(query.new_ones(shape), dropout)
        rows = {name: _of_every_row(each, batch) for name, each in extras.items() if each is not None}
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

        def attend(learned: OfProbabilities, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Codes:
            given: dict[str, Any] = dict(zip(rows, others, strict=True))
            kind = _FLOAT if in_floats else self
            return kind._attend(q, k, v, learned, scaling=scaling, is_causal=is_causal, **given)

        tensors = (query, key, value, *rows.values())
        result, probabilities = _in_blocks(attend, learned, tensors, math.prod(shape[1:]))
        return result.transpose(1, 2).contiguous().to(dtype), probabilities.to(dtype)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        learned: OfProbabilities,
        *,
        scaling: float,
        is_causal: bool,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Codes:
        with torch.autocast(query.device.type, enabled=False):
            (q, q_step), (k, k_step) = self.quantize(query, -1), self.quantize(key, -1)
            scores = (q @ k.transpose(-1, -2)) * (q_step * scaling) * k_step.transpose(-1, -2)
            scores = scores if bias is None else scores + bias.to(scores.dtype)
            p, p_step = self.quantize_probabilities(_masked_softmax(scores, mask, is_causal), learned)
            p = p if kept is None else p * kept
            v, v_step = self.quantize(value, -2)
            return (p @ v) * p_step * v_step, p * p_step


def _itself(x: Tensor, dim: Any) -> Codes:
    return x, x.new_ones(1, 1)


_FLOAT = Attention(_itself, _itself)
# q, k, v rounded to -127..127 by the largest; p = round(255 P / max P).
int8_attention = Attention(_int8, _uint8)
# Signs, and the mean size; p = 1 where P is at least the even share of the keys that can be seen, s_p the mean of these
# P; or as the `BinaryProbabilities` of the module say. Scales: XNOR-Net (Rastegari et al., ECCV 2016), section 3.2;
# unsigned probabilities: BiT (Liu et al., NeurIPS 2022), section 2.2.
binary_attention = Attention(_signs, _zero_or_one)

ATTENTIONS = {"proxbit_int8": int8_attention, BINARY: binary_attention}
