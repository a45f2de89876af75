"""Writes the page of pairs and functions, `pairs.md`, and its `pairs/*.svg`: `python docs/gallery.py [FOLDER]`."""

import sys
from pathlib import Path

from proxbit.analysis.pairs import PairSummary, summarize_pairs
from proxbit.analysis.plots import plot_pair
from proxbit.quantizers import FUNCTIONS, get_pair

HEAD = """# The quantizer pairs

Written by `python docs/gallery.py` from the code; a test fails when it is stale. The verdict is that of
`proxbit.decompose`, from the numbers of F and B alone, at the start of the default schedule. w is a latent weight in
row units: divided by the mean |w| of its row, unless the pair says otherwise. `proxbit plot NAME` draws the same
pictures for any mu.

| name | verdict | at the end of its schedule | source |
|---|---|---|---|
"""

STEPWISE = """
The learning rate limits mu: every step starts from P(w), which pulls a weight towards its level by up to mu, in row
units, whatever the learning rate. A step of Adam is about lr / mean |w| of the row in these units. Keep mu at the end
below that, with `mu_end` of `ProxConnectArguments`: the default of {end:g} outweighs a learning rate of 3e-4
wherever mean |w| is above {limit:g}, and little is learned.
"""

TABLE = """
## The functions

What pairs are made of: each may be F, B, the proximal map P or the transform T of a pair of your own. The kernels
compute those with a compiled form, see [In training](kernels.md#in-training); torch's operators compute the others.

| name | f(w) | derivative | compiled | source |
|---|---|---|---|---|
"""


def _function(name: str) -> str:
    row = FUNCTIONS.get(name)
    derivative = "" if row.derivative is None else row.derivative.name
    cells = (f"`{name}`", f"`{row.formula}`", derivative, row.compiled or "", row.source)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _line(row: PairSummary) -> str:
    cells = (f"[`{row.name}`](#{row.name})", "sound" if row.sound else "heuristic", row.hardens, row.source)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _section(row: PairSummary) -> str:
    verdict = "Sound" if row.sound else "Heuristic"
    pair = get_pair(row.name)
    warning = "" if pair.update_from is None else STEPWISE.format(end=pair.schedule[2], limit=3e-4 / pair.schedule[2])
    return (
        f'\n<a id="{row.name}"></a>\n\n## {row.name}\n\n```\n{row.forward}\n{row.backward}\n```\n\n'
        f"{verdict}: {row.reason}\n{warning}\n![F, B, P, T and r of {row.name}](pairs/{row.name}.svg)\n"
    )


def write(folder: Path) -> None:
    """Write the page and its pictures into a folder."""
    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    rows = summarize_pairs()
    page = HEAD + "".join(map(_line, rows)) + "".join(map(_section, rows)) + TABLE + "".join(map(_function, FUNCTIONS))
    (folder / "pairs.md").write_text(page, encoding="utf-8")
    for row in rows:
        plot_pair(row.name, folder / "pairs" / f"{row.name}.svg")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
