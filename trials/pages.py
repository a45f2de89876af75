"""Where the trials write their pages; the format is the benchmarks' own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from report import finish, table

__all__ = ["RESULTS", "finish", "table"]

RESULTS = Path(__file__).parent / "results"
