"""What the pages of benchmarks share: tables, goals beside what was measured, files."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from proxbit.analysis.environment import Environment

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Goal:
    """A number to reach.

    Attributes:
        what: in words.
        at_least: the goal.
        stretch: the one beyond it, if any.
        unit: of the numbers; a ratio unless it is said.
    """

    what: str
    at_least: float
    stretch: float | None = None
    unit: str = "x"

    def verdict(self, measured: float | None) -> str:
        """Whether the number as printed reaches the goal."""
        if measured is None:
            return "not measured"
        if self.stretch is not None and round(measured, 2) >= self.stretch:
            return "met, stretch too"
        return "met" if round(measured, 2) >= self.at_least else "**missed**"


def keep(row: dict[str, Any], path: Path) -> None:
    """Add a run that is finished to the lines that a benchmark goes on from, and print it."""
    line = json.dumps(row)
    with path.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, with an empty line after it."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)] + [""]


def goal_table(measured: dict[Goal, float | None], here: Environment) -> list[str]:
    """The goals beside what was measured, and on which kernels."""
    rows = []
    for goal, value in measured.items():
        stretch = "" if goal.stretch is None else f"{goal.stretch:g} {goal.unit}"
        number = "" if value is None else f"{value:.2f} {goal.unit}"
        rows.append([goal.what, f"{goal.at_least:g} {goal.unit}", stretch, number, goal.verdict(value)])
    note = f"The goals were set on a processor with AVX-512 (VPOPCNTDQ, VBMI). Here the level `{here.level}` ran."
    return ["## Goals", "", note, "", *table(["1 thread", "at least", "stretch", "measured", ""], rows)]


def finish(name: str, lines: list[str], data: dict[str, Any], here: Environment, folder: Path | None) -> None:
    """Print the page, and write it beside its numbers unless there is no folder to write to."""
    page = "\n".join(lines).rstrip() + "\n"
    print(page)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(page, encoding="utf-8")
        # Where the library lies is nobody's business but this machine's.
        described = {name: value for name, value in asdict(here).items() if name != "library"}
        text = json.dumps({"environment": described, **data}, indent=1)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def goals_data(measured: dict[Goal, float | None]) -> list[dict[str, Any]]:
    """The goals as JSON."""
    return [
        asdict(goal) | {"measured": value, "verdict": goal.verdict(value).strip("*")}
        for goal, value in measured.items()
    ]
