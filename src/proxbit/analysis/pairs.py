"""The family of quantizer pairs as a table: what each is, and whether the theory stands behind it."""

from dataclasses import dataclass

from proxbit.quantizers import PAIRS, decompose, get_pair

__all__ = ["PairSummary", "summarize_pairs"]


@dataclass(frozen=True)
class PairSummary:
    """One pair, in words.

    Attributes:
        name: the registered name.
        forward: F in one line.
        backward: B in one line.
        sound: the verdict of `decompose`, at the start of the default schedule.
        reason: why, with the first interval where the criterion fails.
        hardens: what the forward is at the end of the default schedule.
        source: paper.
    """

    name: str
    forward: str
    backward: str
    sound: bool
    reason: str
    hardens: str
    source: str


def _hardens(name: str) -> str:
    pair = get_pair(name)
    if not pair.levels:
        return "is never quantized"
    if pair.hard_from is None:
        return "stays off its levels: end with a hard part"
    if pair.hard_from == 0:
        return "reaches its levels"
    return f"reaches its levels for |w| >= {pair.hard_from:g} row means"


def summarize_pairs() -> list[PairSummary]:
    """Every registered pair, in the order of registration, each judged anew by `decompose`."""
    rows = []
    for name in PAIRS:
        pair, verdict = get_pair(name), decompose(name)
        where = "" if verdict.interval is None else " First on [{:.3g}, {:.3g}].".format(*verdict.interval)
        rows.append(
            PairSummary(
                name=name,
                forward=pair.forward_formula,
                backward=pair.backward_formula,
                sound=verdict.sound,
                reason=verdict.reason + where,
                hardens=_hardens(name),
                source=pair.source,
            )
        )
    return rows
