"""Bars on standard error, and nothing where nobody looks."""

from proxbit.cli.progress import watch


def test_items_are_handed_on_and_pipes_stay_clean(capsys):
    assert list(watch("Reading", iter("abc"), 3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
