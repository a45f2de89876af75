"""What a program runs on: versions, the processor, the compiled kernels. No time means anything without it."""

import os
import platform
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from proxbit import kernels
from proxbit.kernels.cpu import isas, native
from proxbit.kernels.interface import find_library

__all__ = ["Environment", "environment"]

CPU_INFORMATION = Path("/proc/cpuinfo")
REFERENCE = "reference"


@dataclass(frozen=True)
class Environment:
    """Where a program runs.

    Attributes:
        versions: of proxbit, torch, transformers and Python, by name.
        cpu: model of the processor.
        cores: that this process may use.
        threads: that torch uses.
        library: path of the compiled kernels; None where proxbit was installed without them.
        level: the instruction level that runs; "reference" for plain torch.
        levels: that this processor runs, fastest first.
        isa: the environment variable PROXBIT_ISA; None if it is not set.
    """

    versions: dict[str, str]
    cpu: str
    cores: int
    threads: int
    library: str | None
    level: str
    levels: tuple[str, ...]
    isa: str | None

    @property
    def advice(self) -> str | None:
        """What to do where packed layers run on the reference; None where they do not."""
        if self.level != REFERENCE:
            return None
        slow = "Packed layers run on the plain torch reference, which is slow"
        if self.library is not None:
            return f"{slow}: unset PROXBIT_ISA to use the compiled kernels."
        return f"{slow}: install a C++ compiler, then pip install --force-reinstall proxbit"

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"{self.cpu}, {self.cores} cores; kernels: {self.level}; {versions}"


def cpu_model(information: Path = CPU_INFORMATION) -> str:
    """The name of the processor, as the system tells it."""
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> Environment:
    """Look at this process and its machine.

    Raises:
        ConfigError: if PROXBIT_ISA names a level that this machine does not run.
    """
    with warnings.catch_warnings():
        # The advice says the same.
        warnings.simplefilter("ignore")
        chosen = native()
    path = find_library([str(Path(folder)) for folder in kernels.__path__])
    python = platform.python_version()
    return Environment(
        versions={
            "proxbit": version("proxbit"),
            "torch": torch.__version__,  # with the build
            "transformers": version("transformers"),
            "python": python,
        },
        cpu=cpu_model(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        library=None if path is None else str(path),
        level=REFERENCE if chosen is None else chosen.name,
        levels=() if path is None else tuple(isas(path)),
        isa=os.environ.get("PROXBIT_ISA"),
    )
