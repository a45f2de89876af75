"""The family: every method by name, one row of data each. Importing this module registers them."""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from proxbit.errors import ConfigError
from proxbit.quantizers import transforms as t
from proxbit.quantizers.catalog import register_pair
from proxbit.quantizers.pairs import BINARY, QuantizerPair, Row, Surrogate, compose, heuristic
from proxbit.quantizers.proximal import (
    BINARYRELAX,
    BOX,
    IDENTITY,
    PARQ,
    PERIOD,
    SIGN,
    TANH,
    LinearQuantizer,
    Mu,
    ProximalMap,
    Pull,
)
from proxbit.sign import reaches, sign

__all__: list[str] = []

PCPP = "ProxConnect++: Lu, Yu, Li, Partovi Nia, NeurIPS 2023, https://huggingface.co/papers/2402.17710"
BNN = "Binarized Neural Networks: Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, NeurIPS 2016"
BIREAL = "Bi-Real Net: Liu, Wu, Luo, Yang, Liu, Cheng, ECCV 2018"
IRNET = "IR-Net: Qin, Gong, Liu, Shen, Wei, Yu, Song, CVPR 2020"
FDA = "FDA-BNN: Xu, Han, Xu, Tang, Xu, Wang, NeurIPS 2021"
BIPER = "BiPer: Vargas, Correa, Hinojosa, Arguello, CVPR 2024, https://huggingface.co/papers/2404.01278"
PC = "ProxConnect: Dockhorn, Yu, Sari, Zolnouri, Partovi Nia, NeurIPS 2021"
PROXQUANT = "ProxQuant: Bai, Wang, Liberty, ICLR 2019"
ADABIN = "AdaBin: Tu, Chen, Ren, Wang, ECCV 2022"
XNOR = "XNOR-Net: Rastegari, Ordonez, Redmon, Farhadi, ECCV 2016"
POSITIVE = (1e-3, math.inf)


def _sign(w: Tensor, mu: Mu) -> Tensor:
    return sign(w)


def _box(w: Tensor, mu: Mu) -> Tensor:
    return reaches(-w.abs(), -1)


def _fourier_slope(w: Tensor, mu: Mu) -> Tensor:
    return t.FOURIER.derivative(PERIOD(w, mu), mu)


def _reste(w: Tensor, mu: Mu) -> Tensor:
    smallest, largest = 0.1, 1.5
    size = w.abs()
    power = size.clamp(min=smallest) ** ((1 - mu) / mu) / mu
    secant = smallest ** (1 / mu) / smallest
    inner = reaches(-size, -smallest)
    return (inner * secant + (1 - inner) * power) * reaches(-size, -largest)


def _dsq(w: Tensor, mu: Mu) -> Tensor:
    scale = 1 / t.as_tensor_like(mu, w).tanh()
    return scale * mu * (1 - (mu * w).tanh() ** 2) * _box(w, mu)


def _square_wave(w: Tensor, mu: Mu) -> Tensor:
    return sign((mu * w).sin())


def _linear(levels: Sequence[float], rho: float, varrho: float, source: str) -> tuple[ProximalMap, Row]:
    """L for any levels, and the fields of a row that follow from them: it is hard once a shrink is half a gap."""
    valid = isinstance(levels, Sequence) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in (*levels, rho, varrho)
    )
    gaps = [high - low for low, high in zip(levels[:-1], levels[1:], strict=True)] if valid else []
    if not gaps or min(gaps) <= 0 or min(rho, varrho) < 0 or max(rho, varrho) == 0:
        raise ConfigError(
            "levels must be two or more increasing numbers, such as [-1, 0, 1], and rho and varrho must not be "
            f"negative or both zero; not levels={levels!r}, rho={rho}, varrho={varrho}."
        )
    quantizer = LinearQuantizer(tuple(map(float, levels)), float(rho), float(varrho))
    names = ", ".join(f"{level:g}" for level in levels)
    formula = f"P(w) = L(w) towards {{{names}}}, rho = {rho:g} mu, varrho = {varrho:g} mu"
    hard = max(gaps) / 2 / max(rho, varrho)
    row = Row(levels=quantizer.levels, schedule=("linear", 0.01 * hard, hard), hard_from=0.0, source=source)
    return ProximalMap("linear", quantizer, formula, source), row


def _pc(levels: Sequence[float] = BINARY, rho: float = 1.0, varrho: float = 1.0) -> QuantizerPair:
    proximal, row = _linear(levels, rho, varrho, f"{PC}, linear quantizer")
    return compose(proximal, **row)


def _stepwise(levels: Sequence[float], source: str) -> tuple[ProximalMap, Row]:
    """A step of its own, taken anew at every step: it pulls a weight towards its level by up to mu."""
    # In row units, and whatever the learning rate. A step of Adam is about lr, in these units lr / mean |w| of the row:
    # unless mu ends below that, little is learned. 0.02 is too much at lr = 3e-4; `mu_end` of the Trainer lowers it.
    _, row = _linear(levels, 1.0, 1.0, source)
    names = ", ".join(f"{level:g}" for level in row["levels"])
    formula = f"P(w) = w - clip(w - q, -mu, mu), q the nearest of {names}"
    proximal = ProximalMap("pull", Pull(row["levels"]), formula, source)
    row |= Row(schedule=("linear", 0.0, 0.02 * row["schedule"][2]), hard_from=None)
    return proximal, row


def _proxquant(levels: Sequence[float] = BINARY) -> QuantizerPair:
    proximal, row = _stepwise(levels, PROXQUANT)
    return replace(compose(proximal, **row), update_from=proximal)


def _rpc(levels: Sequence[float] = BINARY) -> QuantizerPair:
    proximal, row = _stepwise(levels, f"reverse ProxConnect, {PC}")
    return replace(compose(IDENTITY, **row), update_from=proximal)


SIGN_FORWARD = Surrogate(_sign, "F(w) = sign(w)")
EDE_BACKWARD = Surrogate(t.EDE.derivative, "B(w) = k mu (1 - tanh(mu w)^2), k = max(1/mu, 1)")
BOX_BACKWARD = Surrogate(_box, "B(w) = 1[|w| <= 1]")

register_pair("fp", compose(IDENTITY, levels=(), source="full precision"))
register_pair("bc", compose(SIGN, hard_from=0.0, source="BinaryConnect: Courbariaux, Bengio, David, NeurIPS 2015"))
register_pair(
    "dorefa",
    compose(
        SIGN,
        scaling=("tensor", "fixed", "none"),
        hard_from=0.0,
        source="DoReFa-Net: Zhou, Wu, Ni, Zhou, Wen, Zou, 2016, one scale for the whole tensor",
    ),
)
register_pair("pc", _pc)
register_pair("proxquant", _proxquant)
register_pair("rpc", _rpc)
register_pair("binaryrelax", compose(BINARYRELAX, schedule=("log", 0.1, 10_000.0), hard_from=0.0))
register_pair("parq", compose(PARQ, mu_range=(1.0, math.inf), schedule=("sigmoid", 1.0, 100.0), hard_from=0.01))
register_pair("md-tanh", compose(TANH, mu_range=POSITIVE, schedule=("log", 0.3, 100.0), hard_from=0.04))
register_pair(
    "tanh",
    compose(
        IDENTITY,
        t.TANH,
        mu_range=POSITIVE,
        schedule=("log", 0.3, 30.0),
        hard_from=0.13,
        source="projected gradient on tanh(mu w)",
    ),
)
register_pair("bnn", heuristic(SIGN_FORWARD, BOX_BACKWARD, hard_from=0.0, source=BNN))
register_pair(
    "bnn+",
    heuristic(
        SIGN_FORWARD,
        Surrogate(t.SIGN_SWISH.derivative, "B(w) = SS'_mu(w)"),
        mu_range=POSITIVE,
        schedule=("constant", 5.0, 5.0),
        hard_from=0.0,
        source=t.SIGN_SWISH.source,
    ),
)
register_pair(
    "bnn++",
    compose(
        IDENTITY,
        t.SIGN_SWISH,
        mu_range=POSITIVE,
        schedule=("log", 0.3, 30.0),
        hard_from=0.33,
        source=f"BNN++, {PCPP}",
    ),
)
register_pair(
    "bireal",
    heuristic(
        SIGN_FORWARD,
        Surrogate(t.POLYNOMIAL.derivative, "B(w) = mu (2 - 2 |mu w|)+"),
        mu_range=POSITIVE,
        hard_from=0.0,
        source=BIREAL,
    ),
)
register_pair(
    "bireal++",
    compose(
        BOX,
        t.POLYNOMIAL,
        mu_range=POSITIVE,
        schedule=("log", 0.2, 30.0),
        hard_from=0.033,
        source=f"{PCPP}; {BIREAL}",
    ),
)
register_pair(
    "ede",
    heuristic(SIGN_FORWARD, EDE_BACKWARD, mu_range=POSITIVE, schedule=("log", 0.1, 10.0), hard_from=0.0, source=IRNET),
)
register_pair(
    "ede++",
    compose(
        IDENTITY,
        t.EDE,
        mu_range=POSITIVE,
        schedule=("log", 0.1, 30.0),
        hard_from=0.13,
        source=f"{PCPP}; {IRNET}",
    ),
)
register_pair(
    "fda",
    heuristic(
        SIGN_FORWARD,
        Surrogate(_fourier_slope, "B(w) = s'_mu(w) for |w| <= pi, else 0"),
        mu_range=(0.0, 31.0),
        schedule=("linear", 9.0, 18.0),
        hard_from=0.0,
        source=FDA,
    ),
)
register_pair(
    "fda++",
    compose(PERIOD, t.FOURIER, mu_range=(0.0, 31.0), schedule=("linear", 0.0, 31.0), source=f"{PCPP}; {FDA}"),
)
register_pair(
    "reste",
    heuristic(
        SIGN_FORWARD,
        Surrogate(_reste, "B(w) = |w|^(1/mu - 1) / mu for 0.1 < |w| <= 1.5; below 0.1 its secant, above 1.5 zero"),
        mu_range=(1.0, math.inf),
        schedule=("linear", 1.0, 3.0),
        hard_from=0.0,
        source="ReSTE: Wu, Zheng, Liu, Zheng, ICCV 2023",
    ),
)
register_pair(
    "dsq",
    heuristic(
        SIGN_FORWARD,
        Surrogate(_dsq, "B(w) = mu (1 - tanh(mu w)^2) / tanh(mu) for |w| <= 1, else 0"),
        mu_range=POSITIVE,
        schedule=("log", 1.0, 10.0),
        hard_from=0.0,
        source="DSQ: Gong, Liu, Jiang, Li, Hu, Lin, Yu, Yan, ICCV 2019",
    ),
)
register_pair(
    "biper",
    heuristic(
        Surrogate(_square_wave, "F(w) = sign(sin(mu w))"),
        Surrogate(t.SINE.derivative, "B(w) = mu cos(mu w)"),
        mu_range=POSITIVE,
        source=f"second stage of {BIPER}",
    ),
)
register_pair("biper-sine", compose(IDENTITY, t.SINE, mu_range=POSITIVE, source=f"first stage of {BIPER}"))
register_pair(
    "xnor", heuristic(SIGN_FORWARD, BOX_BACKWARD, scaling=("none", "ls", "remove"), hard_from=0.0, source=XNOR)
)
register_pair(
    "adabin",
    heuristic(
        SIGN_FORWARD,
        EDE_BACKWARD,
        mu_range=POSITIVE,
        schedule=("log", 0.1, 10.0),
        scaling=("std", "fixed", "restore"),
        hard_from=0.0,
        source=ADABIN,
    ),
)
