"""The optimizer view of the ProxConnect++ step: dual weights beside any base optimizer, and no change to the model."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from proxbit.errors import CheckpointError, ConfigError, MuRangeError
from proxbit.quantizers import (
    AGGREGATE,
    MuSchedule,
    QuantizerPair,
    check_rows,
    get_pair,
    quantize,
    update_start,
)

__all__ = ["ProxConnect"]

KEY = "proxconnect"
FIELDS = {"steps": int, "hardened": bool, "mu": list, "latents": list}
COPIED = ("base", "defaults", "pair", "units", "schedule", "steps", "hardened", "duals")


@dataclass
class _Dual:
    """A parameter that holds w = F_mu(w*), and its latent weight w*."""

    parameter: Tensor
    latent: Tensor
    group: int
    mu: float


class ProxConnect(Optimizer):
    r"""Wraps an optimizer: the parameters hold quantized weights, the step is taken on latent ones.

    Step, for each latent weight w* and its parameter w = F_mu(w*), g the gradient at w:
        w* <- w* - (step of the base optimizer for the gradient B_mu(w*) \odot g)
        mu <- the next one;   w <- F_mu(w*)
    A pair with `update_from` steps from P(w*) instead: ProxQuant ("proxquant"), reverse ProxConnect ("rpc").

    It is the step of the layers `BinaryLinear` and `BinaryConv2d`, iterate for iterate. Gradients are those of w, so
    what looks at them before the step (clipping) sees other numbers than with the layers.

    Args:
        optimizer: the base optimizer; its state, its groups and their learning rates stay in use.
        pair: a pair, or the name of one.
        latents: the parameters to quantize, `[rows, ...]`, each of them in a group of the optimizer.
        schedule: of mu, by the number of steps. None: mu = 1 + the sum of the learning rates so far, as ProxConnect has
            it; no pair with `update_from` can learn with that. Whether F then reaches its levels before `harden` is a
            matter of the pair: "bc" is there at any mu, "pc" once mu is large enough (for levels -1 and +1, at 1), and
            a smooth one such as "bnn++" only comes near.
        normalize: see `quantizers.RowUnits`; None for the default of the pair.
        scale: likewise.
        center: likewise.

    Raises:
        ConfigError: for a parameter that the optimizer does not have, that has no rows, no weights or no floating point
            type, or that is given twice; for a pair with `update_from` without a schedule, or with "aggregate".
        LatentError: for a parameter with NaN, infinite values, or a row that is all zero.
        UnknownNameError: for an unknown pair.
        MuRangeError: if the schedule starts or ends out of the range of the pair; without one, when mu leaves it.

    Source:
        ProxConnect: Dockhorn, Yu, Sari, Zolnouri, Partovi Nia, NeurIPS 2021; with B: ProxConnect++, Lu et al., NeurIPS
        2023. The form of a wrapper is that of PARQ (Jin et al., 2025), which first quantizes after the first step; here
        the weights are quantized from the start.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        pair: str | QuantizerPair,
        latents: Iterable[Tensor],
        *,
        schedule: MuSchedule | None = None,
        normalize: str | None = None,
        scale: str | None = None,
        center: str | None = None,
    ) -> None:
        self.base = optimizer
        self.pair = get_pair(pair)
        self.units = self.pair.units.override(normalize=normalize, scale=scale, center=center)
        self.schedule = schedule
        self.steps = 0
        self.hardened = False
        self.duals = self._duals(latents, self._first_mu())
        # As super().__init__, which would make groups and a state beside those of the base optimizer.
        super().__setstate__({"defaults": optimizer.defaults})
        self._write()

    def _first_mu(self) -> float:
        if self.pair.update_from is not None and (self.schedule is None or self.schedule.kind == AGGREGATE):
            kind, start, end = self.pair.schedule
            raise ConfigError(
                "A pair with `update_from` applies P at every step anew: with mu = 1 + the sum of the learning rates "
                f"it never learns. Pass schedule=MuSchedule({kind!r}, {start:g}, {end:g}, steps)."
            )
        if self.schedule is None:
            return self.pair.check_mu(1.0)
        self.pair.check_mu(self.schedule.mu(self.schedule.steps))
        return self.pair.check_mu(self.schedule.mu(0))

    def _duals(self, latents: Iterable[Tensor], mu: float) -> list[_Dual]:
        groups = {id(p): index for index, group in enumerate(self.base.param_groups) for p in group["params"]}
        duals: list[_Dual] = []
        for index, parameter in enumerate(latents):
            reasons = {
                "has no rows": parameter.dim() < 2,
                "is empty": parameter.numel() == 0,
                "is not floating point": not parameter.is_floating_point(),
                "is in no group of the optimizer": id(parameter) not in groups,
                "is there twice": any(parameter is dual.parameter for dual in duals),
            }
            for reason, holds in reasons.items():
                if holds:
                    raise ConfigError(f"Latent weight {index}, of shape {list(parameter.shape)}, {reason}.")
            check_rows(parameter, self.units.center, f"Latent weight {index}", "it out of `latents`")
            duals.append(_Dual(parameter, parameter.detach().clone(), groups[id(parameter)], mu))
        if not duals:
            raise ConfigError("ProxConnect needs at least one latent weight; `latents` is empty.")
        return duals

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of the base optimizer, so that schedulers of the learning rate reach it."""
        return self.base.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """That of the base optimizer."""
        return self.base.state

    @property
    def is_hard(self) -> bool:
        """Whether the parameters hold the hard weights whatever F_mu is; that may have reached its levels before."""
        return self.hardened or (self.schedule is not None and self.schedule.is_hard(self.steps))

    @property
    def mu(self) -> float:
        """The sharpness of the first latent weight: of all of them, unless groups differ in their learning rates."""
        return self.duals[0].mu

    def _arguments(self, dual: _Dual) -> dict[str, Any]:
        mu = torch.tensor(dual.mu, dtype=torch.float64)
        return {"mu": mu, "pair": self.pair, "units": self.units, "hard": self.is_hard}

    @torch.no_grad()
    def _write(self) -> None:
        for dual in self.duals:
            dual.parameter.copy_(quantize(dual.latent, **self._arguments(dual)))

    def _to_latent_gradient(self, dual: _Dual) -> None:
        """Replace the gradient of the quantized weight by that of the latent one."""
        with torch.enable_grad():
            latent = dual.latent.detach().requires_grad_()
            weight = quantize(latent, **self._arguments(dual))
        (dual.parameter.grad,) = torch.autograd.grad(weight, latent, dual.parameter.grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `closure` as in `torch.optim`, called once, with the quantized weights in place.

        Latent weights whose parameter is frozen, or has no gradient, stay. The `grad` of the others is overwritten: it
        then is the gradient for the latent weight. If the base optimizer fails, the quantized weights are put back.

        Raises:
            MuRangeError: if the next mu is out of the range of the pair; nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        next_mus = [self._next_mu(dual) for dual in self.duals]
        for dual in self.duals:  # A model may have been moved since: `accelerator.prepare` does so.
            dual.latent = dual.latent.to(dual.parameter)
        # The base optimizer would go on with the gradient that a parameter had before it was frozen.
        moving = [dual for dual in self.duals if dual.parameter.requires_grad and dual.parameter.grad is not None]
        try:
            for dual in moving:
                self._to_latent_gradient(dual)
                dual.parameter.copy_(update_start(dual.latent, **self._arguments(dual)))
            self.base.step()
            for dual in moving:
                dual.latent.copy_(dual.parameter)
            self.steps += 1
            for dual, mu in zip(self.duals, next_mus, strict=True):
                dual.mu = mu
        finally:
            self._write()
        return loss

    def _next_mu(self, dual: _Dual) -> float:
        if self.schedule is not None:
            return self.pair.check_mu(self.schedule.mu(self.steps + 1))
        return self.pair.check_mu(dual.mu + float(self.param_groups[dual.group]["lr"]))

    def harden(self) -> None:
        """Put the hard weights into the parameters, now and after every further step.

        They are what is stored in one bit a weight, and a scale a row, by

            with optimizer.latent_weights():
                proxbit.pack(proxbit.binarize(model, config))

        with the pair and the units of this optimizer in `config`. Without the context, the hard weights themselves are
        binarized: a pair that takes off the row mean, such as "xnor" or "adabin", takes it off again and changes them.
        """
        self.hardened = True
        self._write()

    @contextmanager
    def latent_weights(self) -> Iterator[None]:
        """Within the context, the parameters hold the latent weights, to be saved, packed or looked at.

        What is written into them there is lost at its end: load a model before it is wrapped.
        """
        with torch.no_grad():
            for dual in self.duals:
                dual.parameter.copy_(dual.latent)
        try:
            yield
        finally:
            self._write()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters that are not quantized."""
        self.base.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: all but hooks, as in `torch.optim`. Copy it together with its model."""
        return {name: getattr(self, name) for name in COPIED}

    def state_dict(self) -> dict[str, Any]:
        """That of the base optimizer, with latent weights, mu and the number of steps under the key 'proxconnect'.

        As in `torch.optim` its tensors are those in use: to keep a state past the next step, copy it.
        """
        own = {
            "steps": self.steps,
            "hardened": self.hardened,
            "mu": [dual.mu for dual in self.duals],
            "latents": [dual.latent for dual in self.duals],
        }
        return {**self.base.state_dict(), KEY: own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a state; the parameters then hold the quantized weights of its latents.

        With a schedule, mu is that of the schedule at the number of steps in the state.

        Raises:
            CheckpointError: if it is not the state of a ProxConnect of the same latent weights and the same kind of
                base optimizer; nothing is changed then.
        """
        own = state_dict.get(KEY)
        if not isinstance(own, Mapping):
            raise CheckpointError(f"This is the state of an optimizer without {KEY!r}: it has no latent weights.")
        self._check_own(own)
        self._load_base({key: value for key, value in state_dict.items() if key != KEY})
        self.steps, self.hardened = own["steps"], own["hardened"]
        for dual, latent, mu in zip(self.duals, own["latents"], own["mu"], strict=True):
            dual.latent = latent.detach().to(dual.parameter, copy=True)
            dual.mu = mu if self.schedule is None else self.schedule.mu(self.steps)
        self._write()

    def _check_own(self, own: Mapping[str, Any]) -> None:
        wrong = [f"{key} ({kind.__name__})" for key, kind in FIELDS.items() if not isinstance(own.get(key), kind)]
        if wrong:
            raise CheckpointError(f"Under {KEY!r}, the state lacks {', '.join(wrong)}, or has another type there.")
        expected = [list(dual.latent.shape) for dual in self.duals]
        found = [list(getattr(latent, "shape", ())) for latent in own["latents"]]
        if found != expected:
            raise CheckpointError(f"The state holds latent weights of shapes {found}; expected {expected}.")
        bad = [index for index, latent in enumerate(own["latents"]) if not bool(torch.isfinite(latent).all())]
        if bad:
            raise CheckpointError(f"Latent weight {bad[0]} of the state holds NaN or infinite values.")
        if own["steps"] < 0:
            raise CheckpointError(f"The state holds {own['steps']} steps; expected 0 or more.")
        if len(own["mu"]) != len(self.duals):
            raise CheckpointError(f"The state holds {len(own['mu'])} values of mu; expected {len(self.duals)}.")
        try:
            for mu in own["mu"]:
                self.pair.check_mu(mu)
        except (MuRangeError, TypeError) as error:
            raise CheckpointError(f"The state is not one of this pair: {error}") from error

    def _load_base(self, state_dict: dict[str, Any]) -> None:
        before = self.base.state, self.base.param_groups
        try:
            self.base.load_state_dict(state_dict)
            for old, new in zip(before[1], self.base.param_groups, strict=True):
                missing = [key for key in self.defaults if key in old and key not in new]
                if missing:
                    raise KeyError(", ".join(missing))
        except Exception as error:
            self.base.state, self.base.param_groups = before
            raise CheckpointError(f"The state is not one of {type(self.base).__name__}: {error!r}.") from error
