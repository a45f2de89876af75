"""Draws the pictures of the README: `python docs/figures.py`."""

from pathlib import Path

from proxbit.analysis.plots import plot_pairs

FOLDER = Path(__file__).parent
PAIRS = ["bc", "pc", "binaryrelax", "parq", "bnn", "bnn+", "bnn++"]

if __name__ == "__main__":
    plot_pairs(PAIRS, FOLDER / "pairs.png", sharpness=(0.3, 1.0, 3.0, 10.0))
