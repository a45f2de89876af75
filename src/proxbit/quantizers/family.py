"""The family: every method by name, one row of data each. Importing this module registers them."""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from proxbit.errors import ConfigError
from proxbit.quantizers.catalog import register_pair
from proxbit.quantizers.functions import (
    BINARYRELAX,
    BOX,
    CLIP,
    EDE,
    FOURIER,
    IDENTITY,
    INDICATOR,
    PERIOD,
    POLYNOMIAL,
    SERIES_SLOPE,
    SIGN,
    SIGN_SWISH,
    SINE,
    TANH,
    Function,
    Mu,
    as_tensor_like,
    define,
)
from proxbit.quantizers.levels import LinearQuantizer, SoftThreshold
from proxbit.quantizers.pairs import BINARY, QuantizerPair, Row, compose, heuristic
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
RBNN = "RBNN: Lin, Ji, Xu, Zhang, Wang, Wu, Huang, Lin, NeurIPS 2020, https://huggingface.co/papers/2009.13055"
RESTE = "ReSTE: Wu, Zheng, Liu, Zheng, ICCV 2023"
DSQ = "DSQ: Gong, Liu, Jiang, Li, Hu, Lin, Yu, Yan, ICCV 2019"
XNOR = "XNOR-Net: Rastegari, Ordonez, Redmon, Farhadi, ECCV 2016"
POSITIVE = (1e-3, math.inf)


def _reste(w: Tensor, mu: Mu) -> Tensor:
    smallest, largest = 0.1, 1.5
    size = w.abs()
    power = size.clamp(min=smallest) ** ((1 - mu) / mu) / mu
    secant = smallest ** (1 / mu) / smallest
    inner = reaches(-size, -smallest)
    return (inner * secant + (1 - inner) * power) * reaches(-size, -largest)


def _rbnn(w: Tensor, mu: Mu) -> Tensor:
    gain = (1 / as_tensor_like(mu, w)).clamp(min=1)
    return gain * (math.sqrt(2) * mu - mu * (mu * w.abs())).clamp(min=0)


def _dsq(w: Tensor, mu: Mu) -> Tensor:
    scale = 1 / as_tensor_like(mu, w).tanh()
    return scale * mu * (1 - (mu * w).tanh() ** 2) * INDICATOR(w, mu)


def _square_wave(w: Tensor, mu: Mu) -> Tensor:
    return sign((mu * w).sin())


def _linear(levels: Sequence[float], rho: float, varrho: float, source: str) -> tuple[Function, Row]:
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
    formula = f"L(w) towards {{{names}}}, rho = {rho:g} mu, varrho = {varrho:g} mu"
    hard = max(gaps) / 2 / max(rho, varrho)
    row = Row(levels=quantizer.levels, schedule=("linear", 0.01 * hard, hard), hard_from=0.0, source=source)
    return Function("linear", quantizer, formula, source, non_decreasing=True), row


def _pc(levels: Sequence[float] = BINARY, rho: float = 1.0, varrho: float = 1.0) -> QuantizerPair:
    proximal, row = _linear(levels, rho, varrho, f"{PC}, linear quantizer")
    return compose(proximal, **row)


def _stepwise(levels: Sequence[float], source: str) -> tuple[Function, Row]:
    """A proximal step at every step of the optimizer: it moves a weight towards its level by up to mu."""
    # In row units, and whatever the learning rate. A step of Adam is about lr, in these units lr / mean |w| of the row:
    # unless mu ends below that, little is learned. 0.02 is too much at lr = 3e-4; `mu_end` of the Trainer lowers it.
    _, row = _linear(levels, 1.0, 1.0, source)
    names = ", ".join(f"{level:g}" for level in row["levels"])
    formula = f"w - clip(w - q, -mu, mu), q the nearest of {names}"
    proximal = Function("soft threshold", SoftThreshold(row["levels"]), formula, source, non_decreasing=True)
    row |= Row(schedule=("linear", 0.0, 0.02 * row["schedule"][2]), hard_from=None)
    return proximal, row


def _proxquant(levels: Sequence[float] = BINARY) -> QuantizerPair:
    proximal, row = _stepwise(levels, PROXQUANT)
    return replace(compose(proximal, **row), update_from=proximal)


def _rpc(levels: Sequence[float] = BINARY) -> QuantizerPair:
    proximal, row = _stepwise(levels, f"reverse ProxConnect, {PC}")
    return replace(compose(IDENTITY, **row), update_from=proximal)


RESTE_BACKWARD = define(
    "reste", _reste, "|w|^(1/mu - 1) / mu for 0.1 < |w| <= 1.5; below 0.1 its secant, above 1.5 zero", source=RESTE
)
RBNN_BACKWARD = define("rbnn", _rbnn, "k (sqrt(2) mu - mu^2 |w|)+, k = max(1/mu, 1)", source=RBNN)
DSQ_BACKWARD = define("dsq", _dsq, "mu (1 - tanh(mu w)^2) / tanh(mu) for |w| <= 1, else 0", source=DSQ)
SQUARE_WAVE = define("square wave", _square_wave, "sign(sin(mu w))", source=BIPER)

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
register_pair("parq", compose(CLIP, mu_range=(1.0, math.inf), schedule=("sigmoid", 1.0, 100.0), hard_from=0.01))
register_pair("md-tanh", compose(TANH, mu_range=POSITIVE, schedule=("log", 0.3, 100.0), hard_from=0.04))
register_pair(
    "tanh",
    compose(
        IDENTITY,
        TANH,
        mu_range=POSITIVE,
        schedule=("log", 0.3, 30.0),
        hard_from=0.13,
        source="projected gradient on tanh(mu w)",
    ),
)
register_pair("bnn", heuristic(SIGN, INDICATOR, hard_from=0.0, source=BNN))
register_pair(
    "bnn+",
    heuristic(
        SIGN,
        SIGN_SWISH.slope,
        mu_range=POSITIVE,
        schedule=("constant", 5.0, 5.0),
        hard_from=0.0,
        source=SIGN_SWISH.source,
    ),
)
register_pair(
    "bnn++",
    compose(
        IDENTITY, SIGN_SWISH, mu_range=POSITIVE, schedule=("log", 0.3, 30.0), hard_from=0.33, source=f"BNN++, {PCPP}"
    ),
)
register_pair("bireal", heuristic(SIGN, POLYNOMIAL.slope, mu_range=POSITIVE, hard_from=0.0, source=BIREAL))
register_pair(
    "bireal++",
    compose(
        BOX, POLYNOMIAL, mu_range=POSITIVE, schedule=("log", 0.2, 30.0), hard_from=0.033, source=f"{PCPP}; {BIREAL}"
    ),
)
register_pair(
    "ede", heuristic(SIGN, EDE.slope, mu_range=POSITIVE, schedule=("log", 0.1, 10.0), hard_from=0.0, source=IRNET)
)
register_pair(
    "ede++",
    compose(IDENTITY, EDE, mu_range=POSITIVE, schedule=("log", 0.1, 30.0), hard_from=0.13, source=f"{PCPP}; {IRNET}"),
)
register_pair(
    "fda",
    heuristic(SIGN, SERIES_SLOPE, mu_range=(0.0, 31.0), schedule=("linear", 9.0, 18.0), hard_from=0.0, source=FDA),
)
register_pair(
    "fda++", compose(PERIOD, FOURIER, mu_range=(0.0, 31.0), schedule=("linear", 0.0, 31.0), source=f"{PCPP}; {FDA}")
)
register_pair(
    "reste",
    heuristic(
        SIGN, RESTE_BACKWARD, mu_range=(1.0, math.inf), schedule=("linear", 1.0, 3.0), hard_from=0.0, source=RESTE
    ),
)
register_pair(
    "rbnn",
    heuristic(
        SIGN,
        RBNN_BACKWARD,
        mu_range=POSITIVE,
        schedule=("log", 0.01, 10.0),
        scaling=("std", "ls", "remove"),
        hard_from=0.0,
        source=f"{RBNN}, without its rotation",
    ),
)
register_pair(
    "dsq", heuristic(SIGN, DSQ_BACKWARD, mu_range=POSITIVE, schedule=("log", 1.0, 10.0), hard_from=0.0, source=DSQ)
)
register_pair("biper", heuristic(SQUARE_WAVE, SINE.slope, mu_range=POSITIVE, source=f"second stage of {BIPER}"))
register_pair("biper-sine", compose(IDENTITY, SINE, mu_range=POSITIVE, source=f"first stage of {BIPER}"))
register_pair("xnor", heuristic(SIGN, INDICATOR, scaling=("none", "ls", "remove"), hard_from=0.0, source=XNOR))
register_pair(
    "adabin",
    heuristic(
        SIGN,
        EDE.slope,
        mu_range=POSITIVE,
        schedule=("log", 0.1, 10.0),
        scaling=("std", "fixed", "restore"),
        hard_from=0.0,
        source=ADABIN,
    ),
)
