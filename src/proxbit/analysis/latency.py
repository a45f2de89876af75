"""How long a forward pass takes, in the form that cards tell it."""

from typing import Any

from torch import nn

from proxbit.analysis.environment import environment
from proxbit.analysis.timing import time_rounds
from proxbit.analysis.variants import forward_calls, variants

__all__ = ["measure_latency"]


def measure_latency(model: nn.Module, *, batch: int = 1, rounds: int = 11) -> dict[str, Any]:
    """Time a model as float, bf16, int8 dynamic and packed, as `proxbit bench` does.

    Args:
        model: latent or packed; a float one is packed with the default configuration.
        batch: images in a forward pass.
        rounds: each variant is timed once in every round.

    Returns:
        The `latency` of the record of a run: batch, rounds, milliseconds (medians) and spread (distance of the
        quartiles as a fraction of the median) by variant, and the machine.

    Raises:
        ModelStateError: if the model does not take an image alone.
    """
    timings = time_rounds(forward_calls(variants(model), batch), rounds)
    here = environment()
    return {
        "batch": batch,
        "rounds": rounds,
        "milliseconds": {name: 1e3 * timings.median(name) for name in timings.seconds},
        "spread": {name: timings.spread(name) for name in timings.seconds},
        "machine": f"{here}, {here.threads} thread{'s' if here.threads > 1 else ''}",
    }
