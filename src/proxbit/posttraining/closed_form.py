"""The closed form: which signs, scales and biases predict a float layer best from the inputs that there really are.

Everything here is linear algebra on second moments; where they come from is not known. With the inputs x of the
binarized layer and the output y that the float layer gives in its place, means over all tokens:

    H = E[(x - m_x)(x - m_x)^T],  T = E[(y - m_y)(x - m_x)^T]

The error of a weight Q with the best bias, m_y - Q m_x, is E|y - m_y - Q (x - m_x)|^2 = E|y - m_y|^2 - 2 tr(Q T^T)
+ tr(Q H Q^T).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from proxbit.sign import sign

__all__ = ["DAMPING", "Rounding", "Signs", "align", "compensate", "quadratic"]

# Of the mean variance of the inputs: what is added to H before it is inverted to spread rounding errors.
DAMPING = 0.01
PASSES = 2
SWEEPS = 6
BLOCK = 128
SMALLEST = 1e-12


def align(cross: Tensor, prior: Tensor, covariance: Tensor, ridge: float) -> Tensor:
    r"""The weight that predicts y from x in least squares, and goes to the prior where the data say nothing.

    Formula:
        W' = (T + r P)(H + r I)^{-1},  the minimiser of E|y - m_y - W' (x - m_x)|^2 + r |W' - P|^2

    Args:
        cross: T, `[O, I]`, float64.
        prior: P, the float weight, `[O, I]`.
        covariance: H, `[I, I]`.
        ridge: r, >= 0, in units of a variance of x. With 0, H must be positive definite.

    Returns:
        `[O, I]`.

    Source:
        the asymmetric target: GPTAQ, Li et al., ICML 2025, arXiv 2504.02692; here it is solved before rounding.
    """
    damped = covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor = torch.linalg.cholesky(damped)
    return torch.cholesky_solve((cross + ridge * prior).T, factor).T


def quadratic(rows: Tensor, covariance: Tensor) -> Tensor:
    """v H v^T of every row v, `[O]`."""
    return ((rows @ covariance) * rows).sum(dim=1)


@dataclass(frozen=True)
class Rounding:
    """How the rows of a layer may be rounded: to c - a and c + a.

    Attributes:
        scale: "row": each row has an a of its own; "tensor": all have one; "fixed": it is given, and stays.
        offset: whether each row has a c; else it is 0.
    """

    scale: str = "row"
    offset: bool = False


@dataclass(frozen=True)
class Signs:
    """Rows that were rounded.

    Attributes:
        signs: s, `[O, I]`, +-1.
        scale: a, `[O]`.
        offset: c, `[O]`.
        sources: what each sign was rounded from, less c, `[O, I]`: its size says how sure the sign is.
    """

    signs: Tensor
    scale: Tensor
    offset: Tensor
    sources: Tensor

    @property
    def weight(self) -> Tensor:
        """c + a s, `[O, I]`."""
        return self.offset[:, None] + self.scale[:, None] * self.signs


def compensate(weight: Tensor, covariance: Tensor, rounding: Rounding, scale: Tensor) -> Signs:
    r"""Round the rows of a weight so that later columns make up for the errors of earlier ones.

    Formula, for columns j in the order of falling H_jj, U = chol((H + d I)^{-1}) upper, d = 0.01 mean(diag H):
        s_j = sign(w_j - c),  e = (w_j - c - a s_j) / U_jj,  w_k <- w_k - e U_jk  for k > j
    after every pass a (and c) are the least-squares ones, a = (w H s) / (s H s). Then sweeps over the columns flip
    single signs wherever that lowers the error. Of each row the best of all is kept, plain signs among them.

    Args:
        weight: `[O, I]`, float64.
        covariance: H, `[I, I]`, with a positive mean of its diagonal.
        rounding: what a and c may be.
        scale: where a starts, `[O]`; where it stays with `rounding.scale == "fixed"`.

    Returns:
        Rows for which (w - q) H (w - q)^T is at most that of plain signs with their best scale.

    Source:
        Frantar, Ashkboos, Hoefler, Alistarh, GPTQ, ICLR 2023; scales between passes, and flips: ours.
    """
    order = covariance.diagonal().argsort(descending=True, stable=True)
    back = order.argsort()
    weight, covariance = weight[:, order], covariance[order][:, order]
    size = covariance.diagonal().mean()
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    damped = covariance + DAMPING * size * eye
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    problem = _Problem(weight, damped, rounding, scale)
    offset = weight.mean(dim=1) if rounding.offset else torch.zeros_like(scale)
    best = found = problem.fitted(weight - offset[:, None])
    for _ in range(PASSES):
        found = problem.fitted(_pass(weight - found.offset[:, None], found.scale, upper))
        best = problem.better(best, found)
    for _ in range(SWEEPS):
        flipped = _flips(best, weight, damped)
        if not bool(flipped.any()):
            break
        best = problem.better(best, problem.fitted(torch.where(flipped, -best.sources, best.sources)))
    return Signs(best.signs[:, back], best.scale, best.offset, best.sources[:, back])


@dataclass(frozen=True)
class _Problem:
    """Rows that are to be rounded, and in which metric."""

    weight: Tensor
    covariance: Tensor
    rounding: Rounding
    start: Tensor

    def fitted(self, sources: Tensor) -> Signs:
        """The signs of some sources with the scale, and the offset, that are best for them."""
        signs = sign(sources)
        seen = signs @ self.covariance
        ss, sw = (seen * signs).sum(dim=1), (seen * self.weight).sum(dim=1)
        if not self.rounding.offset:
            return _turned(Signs(signs, self._scale(sw, ss), torch.zeros_like(sw), sources))
        ones = self.covariance.sum(dim=0)
        oo, so, wo = ones.sum().clamp(min=SMALLEST), seen.sum(dim=1), self.weight @ ones
        scale = self._scale(sw - so * wo / oo, ss - so * so / oo)
        return _turned(Signs(signs, scale, (wo - scale * so) / oo, sources))

    def _scale(self, product: Tensor, square: Tensor) -> Tensor:
        if self.rounding.scale == "fixed":
            return self.start
        if self.rounding.scale == "tensor":
            return (product.sum() / square.sum().clamp(min=SMALLEST)).expand_as(product)
        return product / square.clamp(min=SMALLEST)

    def _errors(self, found: Signs) -> Tensor:
        errors = quadratic(self.weight - found.weight, self.covariance)
        return errors.sum().expand_as(errors) if self.rounding.scale == "tensor" else errors

    def better(self, one: Signs, other: Signs) -> Signs:
        """Row by row the one with the smaller error; as a whole where all rows have one scale."""
        take = self._errors(other) < self._errors(one)
        mask = take[:, None]
        return Signs(
            torch.where(mask, other.signs, one.signs),
            torch.where(take, other.scale, one.scale),
            torch.where(take, other.offset, one.offset),
            torch.where(mask, other.sources, one.sources),
        )


def _turned(found: Signs) -> Signs:
    """The same rows with scales that are positive."""
    turn = torch.where(found.scale < 0, -1.0, 1.0).to(found.scale)[:, None]
    return Signs(turn * found.signs, found.scale.abs().clamp(min=SMALLEST), found.offset, turn * found.sources)


def _blocks(columns: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK))


def _pass(weight: Tensor, scale: Tensor, upper: Tensor) -> Tensor:
    """What each sign is rounded from, once the errors of all columns before it have been spread."""
    left = weight.T.contiguous().clone()  # columns lie in rows: they are read and written one by one
    for start, end in _blocks(len(left)):
        errors = torch.empty_like(left[start:end])
        for j in range(start, end):
            error = torch.sub(left[j], sign(left[j]) * scale).div_(upper[j, j])
            errors[j - start] = error
            if j + 1 < end:
                left[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
        left[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return left.T


def _flips(found: Signs, weight: Tensor, covariance: Tensor) -> Tensor:
    """Where one sweep over the columns flips a sign, since that lowers the error by itself, `[O, I]`, boolean."""
    signs, scale = found.signs.T.contiguous().clone(), found.scale
    gradient = ((found.weight - weight) @ covariance).T.contiguous()
    flipped = torch.zeros_like(signs, dtype=torch.bool)
    diagonal = covariance.diagonal()
    for start, end in _blocks(len(signs)):
        changes = torch.zeros_like(signs[start:end])
        for j in range(start, end):
            change = -2 * scale * signs[j]
            lower = change * (2 * gradient[j] + change * diagonal[j]) < 0
            change = torch.where(lower, change, 0)
            flipped[j] = lower
            changes[j - start] = change
            if j + 1 < end:
                gradient[j + 1 : end].addr_(covariance[j + 1 : end, j], change)
        gradient[end:].addmm_(covariance[end:, start:end], changes)
    return flipped.T
