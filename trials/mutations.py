"""Deliberate faults that the tests must catch: `python trials/mutations.py` writes `trials/results/mutations.md`.

Each mutation replaces one expression of the source; the tests named beside it must then fail. The source is changed in
place, one mutation at a time, and put back: run it in a clean checkout, with nothing else going on there.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pages import RESULTS, table

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "proxbit"


@dataclass(frozen=True)
class Mutation:
    """One fault.

    Attributes:
        old: an expression that occurs in exactly one place of the source.
        new: what takes its place.
        tests: files and folders below `tests/`, one of whose tests must fail.
    """

    old: str
    new: str
    tests: tuple[str, ...]


def _of(tests: str, *pairs: tuple[str, str]) -> list[Mutation]:
    return [Mutation(old, new, tuple(tests.split())) for old, new in pairs]


MUTATIONS = [
    *_of("test_sign.py packing", ("return values >= 0\n", "return values > 0\n")),
    *_of(
        "packing",
        ("bits[:, :, bit] << bit", "bits[:, :, bit] << (7 - bit)"),
        ("return -(-columns // BITS_PER_BYTE)", "return columns // BITS_PER_BYTE"),
        ("if used and bool((weight[:, -1] >> used).any()):", "if False:"),
        ("if not bool(torch.isfinite(numbers).all()):", "if False:"),
    ),
    *_of(
        "quantizers",
        ("(middle - varrho).clamp(min=low)", "(middle - rho).clamp(min=low)"),
        ("torch.where(w < middle, left, right)", "torch.where(w <= middle, left, right)"),
        ("w / (1 + mu) + sign(w) * (mu / (1 + mu))", "w / (1 + mu) + sign(w) * mu"),
        ("return (w * mu).clamp(-1, 1)\n", "return (w * mu).clamp(-2, 2)\n"),
        ("h = (mu / 2 * p).clamp_(-30, 30)", "h = (mu * p).clamp_(-30, 30)"),
        ("scale = 1 / t.as_tensor_like(mu, w).tanh()", "scale = t.as_tensor_like(mu, w).tanh()"),
        ("size = rows.abs().mean(dim=1, keepdim=True)\n", "size = rows.abs().amax(dim=1, keepdim=True)\n"),
        (
            "torch.maximum(rows.std(dim=1, keepdim=True, correction=0), rounding)",
            "rows.std(dim=1, keepdim=True, correction=1)",
        ),
        (
            "energy = (quantized * quantized).sum(dim=1, keepdim=True)",
            "energy = quantized.abs().sum(dim=1, keepdim=True)",
        ),
        ("if bool(empty.any()):", "if False:"),
        ("step / max(1, self.soft_steps - 1)", "step / max(1, self.soft_steps)"),
        ("self.steps - math.floor(self.steps * self.hard_fraction + 1e-9)", "self.steps"),
    ),
    *_of(
        "optim",
        ("next_mus = [self._next_mu(dual) for dual in self.duals]", "next_mus = [dual.mu for dual in self.duals]"),
        ("self.hardened = True\n        self._write()", "self.hardened = True"),
        ("dual.latent.copy_(dual.parameter)\n            self.steps", "pass\n            self.steps"),
        (
            'if found != expected:\n            raise CheckpointError(f"The state holds latent',
            'if False:\n            raise CheckpointError(f"The state holds latent',
        ),
    ),
    *_of(
        "kernels",
        ("(q, weight, INT8_PEAK) * (step * scale.float())", "(q, weight, INT8_PEAK) * step"),
        ("threshold.float())).float() * 2 - 1", "threshold.float())).float()"),
        ("(grad.to(dtype) * scale.to(dtype)) @ unpack_signs", "grad.to(dtype) @ unpack_signs"),
        ("clipped = units.clamp(lowest.clamp(-INT8_PEAK, 0)", "clipped = units.clamp(lowest.clamp(0, 0)"),
    ),
    *_of(
        "nn",
        ("return torch.where(x >= 0, x, x * self.slope) + self.lift", "return torch.where(x >= 0, x, x * self.slope)"),
        ("clipped + (clipped.round() - clipped).detach(), step", "clipped.round(), step"),
        (
            "half = scale * (self._positive_scale() / 2).to(scale.dtype)",
            "half = scale * self._positive_scale().to(scale.dtype)",
        ),
        ("2 * mean / math.sqrt(self.high)", "mean / math.sqrt(self.high)"),
        ("return self.hardened if self.training else not self.soft_eval", "return self.hardened"),
    ),
    *_of(
        "patching",
        ("module.groups > 1 and module.groups == module.in_channels", "False"),
        ("if module.in_channels <= PIXEL_CHANNELS:", "if False:"),
        ("if not module.weight.requires_grad:", "if False:"),
        ("weight.div_(scale)\n", "pass\n"),
        ("near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)", "near = []"),
    ),
    *_of(
        "posttraining",
        ("torch.cholesky_solve((cross + ridge * prior).T", "torch.cholesky_solve(cross.T"),
        ("return ((rows @ covariance) * rows).sum(dim=1)", "return (rows * rows).sum(dim=1)"),
        ("+ a * b * dx[:, :, None] * dx[:, None, :]", ""),
        ("FEEDBACK = 1.0", "FEEDBACK = 0.0"),
    ),
    *_of(
        "hub",
        ("if len(content) > _JSON_BYTES:", "if False:"),
        ("is_whole = size is None or file.stat().st_size == size", "is_whole = True"),
        ("if aside.exists():\n            aside.rename(folder)", "if False:\n            aside.rename(folder)"),
        ("if Path.cwd().is_relative_to(folder):", "if False:"),
        ("if value > tensors and any(word in where for word in _DEPTH):", "if False:"),
    ),
    *_of(
        "training/test_losses.py training/test_monitor.py training/test_stages.py training/test_callbacks.py",
        ("return divergence * temperature**2", "return divergence * temperature"),
        ("torch.nn.functional.layer_norm(x, x.shape[-1:])", "(x)"),
        ("before[name] ^ signs", "before[name] & signs"),
        ("window = int((steps - first) * _JOINING)", "window = steps - first"),
        ("start_update(self.model)\n", "pass\n"),
        ("stage.layer.mu.fill_(schedule.mu(max(0, step - stage.weight)))", "pass"),
    ),
    *_of(
        "training/test_pixels.py",
        ("grey = values >> 8", "grey = values & 255"),
        ("if long > NARROW * short:", "if False:"),
        ('shown = Image.new("RGBA", upright.size, "white")', 'shown = Image.new("RGBA", upright.size, "black")'),
    ),
]


def find(mutation: Mutation) -> Path:
    """The one file that a mutation changes."""
    places = {file: file.read_text(encoding="utf-8").count(mutation.old) for file in SOURCE.rglob("*.py")}
    found = [file for file, count in places.items() if count]
    if len(found) != 1 or places[found[0]] != 1:
        names = ", ".join(str(file.relative_to(ROOT)) for file in found) or "nothing"
        sys.exit(f"{mutation.old!r} must occur once in src/proxbit: {names}.")
    return found[0]


def survives(mutation: Mutation, file: Path) -> bool:
    """Whether all tests pass with a mutation in the source."""
    text = file.read_text(encoding="utf-8")
    tests = [str(ROOT / "tests" / each) for each in mutation.tests]
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-qx", "-n0", "-p", "no:cacheprovider", *tests]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    finally:
        file.write_text(text, encoding="utf-8")
    if result.returncode not in (0, 1):
        sys.exit(f"pytest ended with status {result.returncode}: {result.stdout[-2000:]}{result.stderr[-2000:]}")
    return result.returncode == 0


def main() -> None:
    """Try every mutation, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    files = [find(mutation) for mutation in MUTATIONS]
    rows, survivors = [], 0
    for mutation, file in zip(MUTATIONS, files, strict=True):
        start = time.monotonic()
        lived = survives(mutation, file)
        survivors += lived
        verdict = "**survived**" if lived else "caught"
        old, new = (f"`{' '.join(each.split())}`" if each else "nothing" for each in (mutation.old, mutation.new))
        print(f"{verdict:12} {time.monotonic() - start:5.0f} s  {old} -> {new}", flush=True)
        rows.append([file.relative_to(SOURCE).as_posix(), old.replace("|", "\\|"), new.replace("|", "\\|"), verdict])
    caught = f"{len(MUTATIONS) - survivors} of {len(MUTATIONS)} mutations are caught by the tests."
    lines = ["# Mutations", "", f"`python trials/mutations.py`: {caught}", ""]
    options.out.mkdir(parents=True, exist_ok=True)
    page = "\n".join([*lines, *table(["file", "source", "mutation", ""], rows)]).rstrip() + "\n"
    (options.out / "mutations.md").write_text(page, encoding="utf-8")
    sys.exit(f"{survivors} mutations survived." if survivors else 0)


if __name__ == "__main__":
    main()
