"""Attention on int8 and on binary operands, as functions that transformers calls instead of its own.

They take what its attention functions take, and treat masks, dropout and grouped keys like `sdpa`. Products are sums of
whole numbers; softmax is that of floats. Gradients pass the rounding straight, and signs with the B of a pair.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.nn.activation_quantizer import DEFAULT_ACTIVATION_PAIR
from proxbit.nn.blockwise import Blockwise, is_plain
from proxbit.nn.modes import attends_in_floats
from proxbit.nn.probabilities import BinaryProbabilities, binarize_probabilities, even_share
from proxbit.nn.surrogate import binarize_units, clip, straight_through
from proxbit.quantizers import get_pair
from proxbit.sign import reaches, sign

__all__ = ["ATTENTIONS", "BINARY", "LEARNED_SCALE", "Attention", "binary_attention", "int8_attention"]

BINARY = "proxbit_binary"
# The `BinaryProbabilities` of an attention module, if it has any.
LEARNED_SCALE = "binary_probabilities"

_SMALLEST = 1e-30

Codes = tuple[Tensor, Tensor]
OfProbabilities = Callable[[Tensor], Codes] | None


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
    """`attend(learned, *tensors)`, for some pictures at a time."""
    if is_plain():
        return attend(learned, *tensors)
    if learned is None:
        made = Blockwise(partial(attend, None), width)((), tensors)
    else:
        by_scale = Blockwise(lambda scale, *rest: attend(partial(binarize_probabilities, scale=scale), *rest), width)
        made = by_scale((learned.scale,), tensors)
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
        in_floats = attends_in_floats()
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
