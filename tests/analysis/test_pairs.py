"""The table of the family: verdicts that are judged anew, and what is said of each forward."""

import pytest

from proxbit.analysis.pairs import summarize_pairs
from proxbit.quantizers import PAIRS, catalog, get_pair, heuristic
from proxbit.registry import Registry


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in summarize_pairs()}


def test_every_pair_has_a_row_in_order(rows):
    assert list(rows) == list(PAIRS)
    for name, row in rows.items():
        assert (row.forward, row.backward) == (get_pair(name).forward_formula, get_pair(name).backward_formula)
        assert row.source == get_pair(name).source


def test_verdicts_come_with_a_reason_and_the_interval(rows):
    assert rows["bnn++"].sound and rows["bnn++"].reason.endswith("F and B are functions of P.")
    assert not rows["bnn"].sound
    assert rows["bnn"].reason == "B changes while P stands still: B is no function of P. First on [-3, -0.0003]."


HARDENS = [
    ("fp", "is never quantized"),
    ("bc", "reaches its levels"),
    ("parq", "reaches its levels for |w| >= 0.01 row means"),
    ("biper-sine", "stays off its levels: end with a hard part"),
]


def test_what_becomes_of_the_forward(rows):
    for name, words in HARDENS:
        assert rows[name].hardens == words


def test_a_registered_pair_is_judged_like_the_others(monkeypatch):
    """A backward that is zero where F moves, under a name of the user."""
    registry = Registry("quantizer pair")
    monkeypatch.setattr(catalog, "PAIRS", registry)
    monkeypatch.setattr("proxbit.analysis.pairs.PAIRS", registry)
    catalog.register_pair("mine", heuristic(lambda w, mu: w, lambda w, mu: 0 * w))
    (row,) = summarize_pairs()
    assert (row.name, row.sound) == ("mine", False)
    assert "F moves where B is zero" in row.reason
