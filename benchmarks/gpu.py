"""Packed linear layers on a GPU, checked against the reference and timed: `python benchmarks/gpu.py`.

Every linear layer of the blocks of ViT-B, L and H, on 1 and 16 tokens, on 197, which are one picture, 8 and 64 times.
"bf16" is `torch.nn.functional.linear`, "int8" is `torch._int_mm` alone: whole numbers in, int32 out, without
quantization, scales or bias, and for more than 16 rows only. W1A8 quantizes its input inside the time. gemlite, where
it is installed, has 1-bit weights in groups of 64 inputs and bf16 activations.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from proxbit.kernels import linear_kernel, linear_w1, linear_w1a1, linear_w1a8, pack_signs, reference

try:
    from gemlite.helper import A16W1_HQQ_INT
except ImportError:
    A16W1_HQQ_INT = None

PAGE = Path(__file__).parent / "results" / "gpu.md"
WIDTHS = {"ViT-B": 768, "ViT-L": 1024, "ViT-H": 1280}
TOKENS = (1, 16, 197, 8 * 197, 64 * 197)
WARM_UPS, REPEATS = 10, 51
_GROUP = 64
# More than the L2 cache of any GPU there is.
_FLUSH_BYTES = 512 * 2**20


def layers(width: int) -> list[tuple[int, int]]:
    """Inputs and outputs: query, key, value and output; both layers of the MLP."""
    return [(width, width), (width, 4 * width), (4 * width, width)]


def make(tokens: int, columns: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, the dense signs, their bits, scales and bias."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, signs, scale, bias = (
        torch.randn(*shape, generator=generator, device="cuda")
        for shape in ((tokens, columns), (rows, columns), (rows,), (rows,))
    )
    return x.bfloat16(), torch.where(signs >= 0, 1.0, -1.0), pack_signs(signs), scale.abs() / columns**0.5, bias


def check(tokens: int, columns: int, rows: int) -> None:
    """Raise AssertionError unless sums of whole numbers are exact, and those of floats as near as fp32 and bf16 are."""
    x, _, weight, scale, bias = make(tokens, columns, rows)
    assert linear_kernel(weight, scale) == "triton", "the Triton kernels do not run on this device"
    for values in (x, x.half(), x.float()):
        for op, exact in ((linear_w1a8, reference.linear_w1a8), (linear_w1a1, reference.linear_w1a1)):
            torch.testing.assert_close(
                op(values, weight, scale, bias), exact(values, weight, scale, bias), rtol=0, atol=0
            )
        expected = reference.linear_w1(values.double(), weight, scale.double(), bias.double())
        size = values.double().abs().sum(1, keepdim=True) * scale.double() + bias.double().abs()
        rounding = 0.0 if values.dtype == torch.float32 else torch.finfo(values.dtype).eps
        error = (linear_w1(values, weight, scale, bias).double() - expected).abs()
        assert bool((error <= 1e-6 * size + rounding * expected.abs()).all()), f"{values.dtype}: {float(error.max())}"


def microseconds(function: Callable[[], object], flush: Tensor | None) -> float:
    """The median time of a call on the GPU; with `flush`, that is overwritten before, so that L2 holds nothing else."""
    for _ in range(WARM_UPS):
        function()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if flush is not None:
            flush.zero_()
        # Queued behind a pause, so that the time of launching from Python is not measured.
        torch.cuda._sleep(1_000_000)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times)


def contenders(tokens: int, columns: int, rows: int) -> dict[str, Callable[[], object] | None]:
    """What is timed, by its name in the table; None where it does not take the shape."""
    x, signs, weight, scale, bias = make(tokens, columns, rows)
    dense, dense_bias = (signs * scale.unsqueeze(1)).bfloat16(), bias.bfloat16()
    q, whole = reference.quantize_activations(x)[0].to(torch.int8), signs.to(torch.int8).t()
    found: dict[str, Callable[[], object] | None] = {
        "bf16": lambda: torch.nn.functional.linear(x, dense, dense_bias),
        "int8": (lambda: torch._int_mm(q, whole)) if tokens > 16 else None,
        "W1": lambda: linear_w1(x, weight, scale, bias),
        "W1A8": lambda: linear_w1a8(x, weight, scale, bias),
        "W1A1": lambda: linear_w1a1(x, weight, scale, bias),
    }
    if A16W1_HQQ_INT is not None:
        # Its weight is (bit - zero) times a scale: +-s is (bit - 1/2) 2 s.
        scales = (2 * scale).bfloat16().unsqueeze(1).repeat(1, columns // _GROUP).reshape(-1, 1)
        bits = (signs > 0).to(torch.uint8)
        module = A16W1_HQQ_INT().from_weights(bits, scales, torch.full_like(scales, 0.5), dense_bias)
        found["gemlite"] = lambda: module(x)
    return found


def measure() -> list[str]:
    """The rows of the table: each cell with the L2 cache as the call before left it, then with it overwritten."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    lines: list[str] = []
    for name, width in WIDTHS.items():
        for columns, rows in layers(width):
            for tokens in TOKENS:
                check(tokens, columns, rows)
                functions = contenders(tokens, columns, rows)
                if not lines:
                    lines += [
                        f"| | inputs | outputs | tokens | {' | '.join(functions)} |",
                        "|---" * (4 + len(functions)) + "|",
                    ]
                cells = [
                    f"{microseconds(function, None):.1f} / {microseconds(function, flush):.1f}" if function else "–"
                    for function in functions.values()
                ]
                lines.append(f"| {name} | {columns} | {rows} | {tokens} | {' | '.join(cells)} |")
                print(lines[-1])
    return lines


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device here: nothing was measured, nothing was written.")
    versions = ", ".join(_version(package) for package in ("torch", "triton", "gemlite"))
    lines = [
        f"`python benchmarks/gpu.py`: {torch.cuda.get_device_name()}, driver {_driver()}, {versions}.",
        f"Microseconds on the GPU without launching, medians of {REPEATS}: L2 cache hot / cold (overwritten before each"
        " call).",
        "Each shape was checked against the reference first: W1A8 and W1A1 equal, W1 to the rounding of its dtype.",
        "bf16: torch's linear; int8: `torch._int_mm` alone, of quantized input, without scales and bias.",
        "",
        *measure(),
    ]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"Written: {PAGE}")


if __name__ == "__main__":
    main()
