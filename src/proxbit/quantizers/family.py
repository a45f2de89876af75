"""The family: every method by name, one row of data each. Importing this module registers them."""

import math

from torch import Tensor

from proxbit.quantizers import transforms as t
from proxbit.quantizers.pairs import Surrogate, compose, heuristic, register_pair
from proxbit.quantizers.proximal import BINARYRELAX, BOX, IDENTITY, LINEAR, PARQ, PERIOD, SIGN, TANH, Mu
from proxbit.sign import sign

__all__: list[str] = []

PCPP = "ProxConnect++: Lu, Yu, Li, Partovi Nia, NeurIPS 2023, https://huggingface.co/papers/2402.17710"
BNN = "Binarized Neural Networks: Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, NeurIPS 2016"
BIREAL = "Bi-Real Net: Liu, Wu, Luo, Yang, Liu, Cheng, ECCV 2018"
IRNET = "IR-Net: Qin, Gong, Liu, Shen, Wei, Yu, Song, CVPR 2020"
FDA = "FDA-BNN: Xu, Han, Xu, Tang, Xu, Wang, NeurIPS 2021"
BIPER = "BiPer: Vargas, Correa, Hinojosa, Arguello, CVPR 2024, https://huggingface.co/papers/2404.01278"
POSITIVE = (1e-3, math.inf)


def _sign(w: Tensor, mu: Mu) -> Tensor:
    return sign(w)


def _box(w: Tensor, mu: Mu) -> Tensor:
    return (w.abs() <= 1).to(w.dtype)


def _fourier_slope(w: Tensor, mu: Mu) -> Tensor:
    return t.FOURIER.derivative(PERIOD(w, mu), mu)


def _reste(w: Tensor, mu: Mu) -> Tensor:
    smallest, largest = 0.1, 1.5
    size = w.abs()
    power = size.clamp(min=smallest) ** ((1 - mu) / mu) / mu
    secant = smallest ** (1 / mu) / smallest
    inner = (size <= smallest).to(w.dtype)
    return (inner * secant + (1 - inner) * power) * (size <= largest).to(w.dtype)


def _dsq(w: Tensor, mu: Mu) -> Tensor:
    scale = 1 / t.as_tensor_like(mu, w).tanh()
    return scale * mu * (1 - (mu * w).tanh() ** 2) * (w.abs() <= 1).to(w.dtype)


def _square_wave(w: Tensor, mu: Mu) -> Tensor:
    return sign((mu * w).sin())


SIGN_FORWARD = Surrogate(_sign, "F(w) = sign(w)")

register_pair("fp", compose(IDENTITY, source="full precision"))
register_pair("bc", compose(SIGN, source="BinaryConnect: Courbariaux, Bengio, David, NeurIPS 2015"))
register_pair("dorefa", compose(SIGN, source="DoReFa-Net: Zhou, Wu, Ni, Zhou, Wen, Zou, 2016; with normalize='tensor'"))
register_pair("pc", compose(LINEAR, schedule=("linear", 0.01, 1.0)))
register_pair("binaryrelax", compose(BINARYRELAX, schedule=("log", 0.1, 1000.0)))
register_pair("parq", compose(PARQ, mu_range=(1.0, math.inf), schedule=("sigmoid", 1.0, 100.0)))
register_pair("md-tanh", compose(TANH, mu_range=POSITIVE, schedule=("log", 0.3, 100.0)))
register_pair(
    "tanh",
    compose(
        IDENTITY, t.TANH, mu_range=POSITIVE, schedule=("log", 0.3, 30.0), source="projected gradient on tanh(mu w)"
    ),
)
register_pair("bnn", heuristic(SIGN_FORWARD, Surrogate(_box, "B(w) = 1[|w| <= 1]"), source=BNN))
register_pair(
    "bnn+",
    heuristic(
        SIGN_FORWARD,
        Surrogate(t.SIGN_SWISH.derivative, "B(w) = SS'_mu(w)"),
        mu_range=POSITIVE,
        schedule=("constant", 5.0, 5.0),
        source=t.SIGN_SWISH.source,
    ),
)
register_pair(
    "bnn++",
    compose(IDENTITY, t.SIGN_SWISH, mu_range=POSITIVE, schedule=("log", 0.3, 30.0), source=f"BNN++, {PCPP}"),
)
register_pair(
    "bireal",
    heuristic(
        SIGN_FORWARD, Surrogate(t.POLYNOMIAL.derivative, "B(w) = mu (2 - 2 |mu w|)+"), mu_range=POSITIVE, source=BIREAL
    ),
)
register_pair(
    "bireal++",
    compose(BOX, t.POLYNOMIAL, mu_range=POSITIVE, schedule=("log", 0.2, 30.0), source=f"{PCPP}; {BIREAL}"),
)
register_pair(
    "ede",
    heuristic(
        SIGN_FORWARD,
        Surrogate(t.EDE.derivative, "B(w) = k mu (1 - tanh(mu w)^2), k = max(1/mu, 1)"),
        mu_range=POSITIVE,
        schedule=("log", 0.1, 10.0),
        source=IRNET,
    ),
)
register_pair(
    "ede++", compose(IDENTITY, t.EDE, mu_range=POSITIVE, schedule=("log", 0.1, 30.0), source=f"{PCPP}; {IRNET}")
)
register_pair(
    "fda",
    heuristic(
        SIGN_FORWARD,
        Surrogate(_fourier_slope, "B(w) = s'_mu(w) for |w| <= pi, else 0"),
        mu_range=(0.0, 31.0),
        schedule=("linear", 9.0, 18.0),
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
