"""Write docs/cards.md: what quantization cards and records of runs say. Command: python docs/cards.py"""

from itertools import groupby
from pathlib import Path

from proxbit.analysis.card import CARD_FIELDS, CARD_NAME
from proxbit.analysis.run import RUN_FIELDS
from proxbit.analysis.schema import field_table

INTRODUCTION = f"""\
# Cards

A release (`write_release`) holds a model card, `README.md`, and a quantization card, `{CARD_NAME}`. Every value of the
quantization card is computed: from the modules and tensors of the model, from its files, or from the record of its
training. Every field must be there; null says that it is unknown. Cards whose totals do not add up are refused. Loading
compares the weight files with the checksums of the card beside them.

The list of what such a card must tell is that of Garg, Jain, Lou and Nahmias, Confounding Tradeoffs for Neural Network
Quantization (arXiv 2102.06366).
"""
RECORD = """\
## The record of a run

What no model can tell: `trainer.run_record()` fills in what the Trainer knows, and a dict with some of these fields is
as good. Other fields are refused.
"""


def page() -> str:
    parts = [INTRODUCTION]
    for group, fields in groupby(CARD_FIELDS, lambda field: field.group):
        parts += [f"## {group.capitalize()}\n", field_table(fields) + "\n"]
    return "\n".join([*parts, RECORD, field_table(RUN_FIELDS) + "\n"])


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
