"""Every quantizer pair on random binary least-squares problems: `python benchmarks/least_squares.py`.

Each problem: A of 48 x 64 normal numbers, a planted w in {-1, +1}^64, y = A w + noise; the loss is ||A w - y||^2 / 48
at the signs of the latent weights, after 1,000 steps of Adam, the last tenth of them hard. Raw units, so that F has no
scale; each pair with the best, by its mean loss, of three learning rates. One row of the weight matrix is one problem.
"""

from pathlib import Path

import torch
from torch import Tensor

from proxbit.quantizers import PAIRS, MuSchedule, get_pair, quantize, update_start

PROBLEMS, ROWS, COLUMNS, NOISE, STEPS = 20, 48, 64, 0.5, 1000
RATES = (0.01, 0.03, 0.1)
UNITS = {"normalize": "none", "scale": "fixed", "center": "none"}


def problems() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, y, the planted weights, and where the latent weights start; the first dimension counts problems."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(PROBLEMS, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    planted = torch.randint(0, 2, (PROBLEMS, COLUMNS), generator=generator).double() * 2 - 1
    noise = NOISE * torch.randn(PROBLEMS, ROWS, generator=generator, dtype=torch.float64)
    start = torch.randn(PROBLEMS, COLUMNS, generator=generator, dtype=torch.float64)
    return a, torch.einsum("pij,pj->pi", a, planted) + noise, planted, start


def losses(a: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """||A w - y||^2 / rows, one number a problem."""
    return (torch.einsum("pij,pj->pi", a, w) - y).square().mean(dim=1)


def train(name: str, rate: float, a: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """The signs after training one pair on all problems at once."""
    pair = get_pair(name)
    schedule = MuSchedule(*pair.schedule, steps=STEPS, hard_fraction=0.1)
    latent = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=rate)
    for step in range(STEPS):
        state = {"mu": torch.tensor(schedule.mu(step), dtype=torch.float64), "hard": schedule.is_hard(step)}
        optimizer.zero_grad()
        losses(a, y, quantize(latent, pair=pair, **state, **UNITS)).sum().backward()
        with torch.no_grad():
            latent.copy_(update_start(latent, pair=pair, **state, **UNITS))
        optimizer.step()
    return torch.where(latent.detach() >= 0, 1.0, -1.0).double()


def main() -> None:
    a, y, planted, start = problems()
    rows = []
    for name in PAIRS:
        results = {rate: train(name, rate, a, y, start) for rate in RATES}
        rate = min(results, key=lambda rate: float(losses(a, y, results[rate]).mean()))
        loss, right = losses(a, y, results[rate]), (results[rate] == planted).double().mean(dim=1)
        rows.append((float(loss.mean()), name, float(loss.std()), float(right.mean()) * 100, rate))
    best = losses(a, y, planted)
    lines = [
        f"`python benchmarks/least_squares.py`: {PROBLEMS} problems, mean ± standard deviation of the loss over them.",
        "Pairs that differ only in their row units (`bc`, `dorefa`; `bnn`, `xnor`; `ede`, `adabin`) are the same here.",
        "",
        "| pair | | loss of the signs | signs as planted, % | learning rate |",
        "|---|---|---|---|---|",
        f"| (the planted weights) | | {best.mean():.3f} ± {best.std():.3f} | 100.0 | |",
    ]
    for mean, name, spread, right, rate in sorted(rows):
        kind = "sound" if get_pair(name).sound else "heuristic"
        lines.append(f"| `{name}` | {kind} | {mean:.3f} ± {spread:.3f} | {right:.1f} | {rate:g} |")
    page = "\n".join(lines) + "\n"
    (Path(__file__).parent / "results" / "least_squares.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
