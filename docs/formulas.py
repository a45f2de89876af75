"""For the reference: formulas of docstrings as code, with their signs as signs."""

import re
from typing import Any

import griffe

SIGNS = {r"\circ": "∘", r"\ge": "≥", r"\le": "≤", r"\sum": "Σ", r"\int": "∫", r"\Delta": "Δ", r"\odot": "⊙"}
SECTION = re.compile(r"^(Formula.*|Forward|Backward):\n((?:(?: {4}.*)?\n)*)", re.MULTILINE)


def as_code(text: str) -> str:
    """A docstring whose formulas are fenced."""
    for command, sign in SIGNS.items():
        text = re.sub(re.escape(command) + r"(?![a-z])", sign, text)
    return SECTION.sub(lambda found: f"{found[1]}:\n    ```text\n{found[2].rstrip()}\n    ```\n\n", f"{text}\n")


class Formulas(griffe.Extension):
    """Reads every docstring of the package."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_code(obj.docstring.value)
