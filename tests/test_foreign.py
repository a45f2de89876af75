"""Strings of others on a terminal."""

import pytest

from proxbit.foreign import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("café 猫 ñ", "café 猫 ñ"),
        ("\x1b[2J\x1b]0;x\x07", r"\x1b[2J\x1b]0;x\x07"),
        ("one\nError: two", r"one\nError: two"),
        ("a\r\tb\x00", r"a\r\tb\x00"),
        ("gpj.\u202eexe", r"gpj.\u202eexe"),
        ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),
        ("\udcff.jpg", r"\udcff.jpg"),
        (3, "3"),
    ],
)
def test_nothing_that_a_terminal_obeys(text, shown):
    assert printable(text) == shown


def test_what_is_long_is_cut():
    assert printable("x" * 200) == "x" * 200
    assert printable("x" * 201) == "x" * 197 + "..."
    assert len(printable("\n" * 10**6, most=20)) == 20
