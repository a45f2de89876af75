"""Attention on int8 and on binary operands, as functions that transformers calls instead of its own.

They take what its attention functions take, and treat masks, dropout and grouped keys like `sdpa`. Products are sums of
whole numbers; softmax is that of floats. Gradients pass the rounding straight, and signs with the B of a pair.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from proxbit.nn.activations import DEFAULT_ACTIVATION_PAIR
from proxbit.nn.probabilities import BinaryProbabilities, even_share
from proxbit.nn.recomputed import recomputed
from proxbit.nn.surrogate import binarize_units
from proxbit.quantizers import get_pair
from proxbit.sign import is_positive

__all__ = ["ATTENTIONS", "BINARY", "LEARNED_SCALE", "Attention", "binary_attention", "int8_attention"]

BINARY = "proxbit_binary"
# The `BinaryProbabilities` of an attention module, if it has any.
LEARNED_SCALE = "binary_probabilities"

_SMALLEST = 1e-30


def _rounded(x: Tensor, step: Tensor, peak: int) -> Tensor:
    """x / step as a whole number up to `peak`; the gradient passes straight."""
    units = x / step.clamp(min=_SMALLEST)
    return units + (units.round().clamp(-peak, peak) - units).detach()


def _int8(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes and their step, by the largest along `dim`."""
    step = x.detach().abs().amax(dim=dim, keepdim=True) / 127
    return _rounded(x, step, 127), step


def _signs(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Signs, and the mean size along `dim`."""
    size = x.abs().mean(dim=dim, keepdim=True)
    pair = get_pair(DEFAULT_ACTIVATION_PAIR)
    units = x / size.detach().clamp(min=_SMALLEST)
    return binarize_units(units, is_positive(x), torch.tensor(pair.schedule[1], dtype=torch.float64), pair), size


def _masked_softmax(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
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


def _uint8(probabilities: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    step = probabilities.detach().amax(dim=-1, keepdim=True) / 255
    return _rounded(probabilities, step, 255), step


def _zero_or_one(probabilities: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """As the module learned it; else 1 where a key has its even share of the probability, and the mean of those."""
    learned = getattr(module, LEARNED_SCALE, None)
    if isinstance(learned, BinaryProbabilities):
        result: tuple[Tensor, Tensor] = learned(probabilities)
        return result
    share = even_share(probabilities)
    is_one = (probabilities >= share) & (probabilities > 0)
    # Units of an elastic quantizer whose upper level is twice the even share.
    inside = probabilities * (probabilities <= 2 * share) / (2 * share)
    codes = inside + (is_one.to(inside.dtype) - inside).detach()
    size = (probabilities * is_one).sum(dim=-1, keepdim=True) / is_one.sum(dim=-1, keepdim=True).clamp(min=1)
    return codes, size


@dataclass(frozen=True)
class Attention:
    r"""Attention on whole numbers, as a function with the arguments of transformers' own.

    Formula:
        S = (q k^T) s_q s_k scaling,   P = softmax(S + mask),   O = (p v) s_p s_v
        q s_q, k s_k: token by token; v s_v: channel by channel; p s_p: row by row

    Args:
        quantize: `(x, dim) -> whole numbers, their size along dim`, for queries, keys and values.
        quantize_probabilities: likewise of P along its rows, `(P, module)`.
    """

    quantize: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    quantize_probabilities: Callable[[Tensor, nn.Module], tuple[Tensor, Tensor]]

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
        p = dropout if module.training else 0.0
        attend = partial(self._attend, module, attention_mask, p, scaling, is_causal, position_bias)
        result, probabilities = recomputed(attend, query, key, value, random=p > 0)
        return result.transpose(1, 2).contiguous().to(dtype), probabilities.to(dtype)

    def _attend(
        self,
        module: nn.Module,
        attention_mask: Tensor | None,
        dropout: float,
        scaling: float | None,
        is_causal: bool,
        position_bias: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(query.device.type, enabled=False):
            (q, q_step), (k, k_step) = self.quantize(query, -1), self.quantize(key, -1)
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            scores = (q @ k.transpose(-1, -2)) * (q_step * scaling) * k_step.transpose(-1, -2)
            scores = scores if position_bias is None else scores + position_bias.to(scores.dtype)
            p, p_step = self.quantize_probabilities(_masked_softmax(scores, attention_mask, is_causal), module)
            p = nn.functional.dropout(p, dropout)
            v, v_step = self.quantize(value, -2)
            return (p @ v) * p_step * v_step, p * p_step


# q, k, v rounded to -127..127 by the largest; p = round(255 P / max P).
int8_attention = Attention(_int8, _uint8)
# Signs, and the mean size; p = 1 where P is at least the even share of the keys that can be seen, s_p the mean of these
# P; or as the `BinaryProbabilities` of the module say. Scales: XNOR-Net (Rastegari et al., ECCV 2016), section 3.2;
# unsigned probabilities: BiT (Liu et al., NeurIPS 2022), section 2.2.
binary_attention = Attention(_signs, _zero_or_one)

ATTENTIONS = {"proxbit_int8": int8_attention, BINARY: binary_attention}
