"""What a quantizer pair costs: `python benchmarks/quantizers.py`.

Forward and backward of each pair on a latent weight of 3072 x 768 numbers (fp32, one thread), beside a
straight-through estimator written by hand, eager and under torch.compile. Each round times every method once; the ratio
is the median over the rounds of (time of the pair / time of the estimator in that round). Memory is the most that is
allocated at once, in multiples of the latent weight; the quantized weight and the gradient are two of them.

The targets are those of `bnn++`, the default: eager within 1.5 times the eager estimator, compiled no slower than the
eager estimator, and at most one more buffer of the size of the latent weight. The page says which of them are missed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from proxbit.quantizers import PAIRS, get_pair, quantize

SHAPE = (3072, 768)
TARGETS = {"eager / eager STE": 1.5, "compiled / eager STE": 1.0, "memory": 2.0}


def straight_through(w: Tensor) -> Tensor:
    """The sign, times the mean |w| of its row, with the gradient of the identity."""
    scale = w.abs().mean(dim=1, keepdim=True).detach()
    return (torch.sign(w) * scale - w).detach() + w


def method(name: str) -> Callable[[Tensor], Tensor]:
    """A pair as a function of the latent weight, at the middle of its schedule, with its own row units."""
    pair = get_pair(name)
    kind, start, end = pair.schedule
    mu = torch.tensor((start * end) ** 0.5 if start > 0 else end / 2, dtype=torch.float64)
    return lambda w: quantize(w, mu, pair, pair.units)


def seconds(function: Callable[[Tensor], Tensor], latent: Tensor, grad: Tensor) -> float:
    """One forward and backward, into a fresh gradient."""
    latent.grad = None
    begin = time.perf_counter()
    function(latent).backward(grad)
    return time.perf_counter() - begin


def extra_memory(function: Callable[[Tensor], Tensor], latent: Tensor, grad: Tensor) -> float:
    """The most that is allocated at once during forward and backward, in multiples of the latent weight."""
    latent.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        function(latent).backward(grad)
    held, peak = 0, 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / (latent.numel() * latent.element_size())


def against_targets(eager: float, compiled: float, memory: float) -> list[str]:
    """The targets beside what was measured of `bnn++`, as lines of the page."""
    lines = ["| target for `bnn++` | at most | measured | |", "|---|---|---|---|"]
    for (name, limit), value in zip(TARGETS.items(), (eager, compiled, memory), strict=True):
        lines.append(f"| {name} | {limit:.2f} | {value:.2f} | {'met' if round(value, 2) <= limit else '**missed**'} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    latent, grad = (torch.randn(SHAPE) * 0.03).requires_grad_(), torch.randn(SHAPE)
    functions = {"straight-through": straight_through} | {name: method(name) for name in arguments.pairs}
    # Every pair is one more specialisation of the same few functions.
    torch._dynamo.config.recompile_limit = 2 * len(functions)
    compiled = {name: torch.compile(function, fullgraph=True) for name, function in functions.items()}
    everything = [
        (name, kind, f) for kind, fs in (("eager", functions), ("compiled", compiled)) for name, f in fs.items()
    ]
    times: dict[tuple[str, str], list[float]] = {(name, kind): [] for name, kind, _ in everything}
    for _ in range(3):
        for _, _, function in everything:
            seconds(function, latent, grad)
    for _ in range(arguments.rounds):
        for name, kind, function in everything:
            times[name, kind].append(seconds(function, latent, grad))

    def ratio(name: str, kind: str, base: str) -> float:
        rounds = zip(times[name, kind], times["straight-through", base], strict=True)
        return statistics.median(mine / theirs for mine, theirs in rounds)

    memory = {name: extra_memory(function, latent, grad) for name, function in functions.items()}
    lines = [
        f"`python benchmarks/quantizers.py`: {SHAPE[0]} x {SHAPE[1]}, fp32, 1 thread, {arguments.rounds} rounds,",
        "medians; STE: the straight-through estimator. Memory in multiples of the latent weight, result and gradient",
        "included.",
        "",
    ]
    if "bnn++" in functions:
        ratios = (ratio("bnn++", kind, "eager") for kind in ("eager", "compiled"))
        lines += [*against_targets(*ratios, memory["bnn++"]), ""]
    lines += [
        "| method | eager, ms | / eager STE | compiled, ms | / eager STE | / compiled STE | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in functions:
        eager, fused = (statistics.median(times[name, kind]) * 1e3 for kind in ("eager", "compiled"))
        lines.append(
            f"| `{name}` | {eager:.1f} | {ratio(name, 'eager', 'eager'):.2f} | {fused:.1f} "
            f"| {ratio(name, 'compiled', 'eager'):.2f} | {ratio(name, 'compiled', 'compiled'):.2f} "
            f"| {memory[name]:.2f} |"
        )
    page = "\n".join(lines) + "\n"
    (Path(__file__).parent / "results" / "quantizers.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
