"""Text that comes from files of others, made fit for a terminal, a log or one line of an error."""

import unicodedata

__all__ = ["first_line", "printable"]

# Control and format characters (escape sequences, text that turns direction), separators of lines, halves of pairs.
_UNFIT = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: object, most: int = 200) -> str:
    """A string of others on one line, without anything that a terminal would obey.

    Args:
        text: what to show; `str` is taken of it.
        most: characters at most; what is longer is cut, and ends with "...".

    Returns:
        The text with control, format and line-separating characters as escapes (`\\x1b`, `\\n`, `\\u202e`).
    """
    whole = str(text)
    shown = "".join(_escaped(each) if unicodedata.category(each) in _UNFIT else each for each in whole[: most + 1])
    return shown if len(whole) <= most else shown[: max(most - 3, 0)] + "..."


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def first_line(error: BaseException) -> str:
    """What an error of a dependency says, without the pages that follow."""
    return printable(str(error).strip().partition("\n")[0].rstrip("."), 1000) or type(error).__name__
