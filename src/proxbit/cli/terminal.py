"""What libraries write to the terminal while a command runs, which may quote files of others."""

import logging

from transformers.utils import logging as transformers_logging

from proxbit.foreign import printable

__all__ = ["guard_terminal"]

LINE = 2000  # characters


def _lines(text: str) -> str:
    """Text whose lines hold nothing that a terminal would obey."""
    return "\n".join(printable(line, LINE) for line in text.split("\n"))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """The record, printable."""
        return _lines(super().format(record))


def guard_terminal() -> None:
    """Have the logs of transformers printed without control characters; `proxbit_cli.main` sees to warnings."""
    transformers_logging.get_logger("transformers")  # which makes the handler, if there is none yet
    for handler in logging.getLogger("transformers").handlers:
        if not isinstance(handler.formatter, _Formatter):
            handler.setFormatter(_Formatter(handler.formatter._fmt if handler.formatter else None))
