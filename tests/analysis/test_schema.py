"""Fields, kinds and their text; every kind refuses what it is not."""

import math

from proxbit.analysis.schema import KINDS, Field, cell, field_table, line, problems

GOOD = {
    "text": ["a"],
    "digest": ["0123456789abcdef" * 4],
    "whole number": [0, 7],
    "number": [0, -1.5],
    "yes or no": [True, False],
    "texts": [[], ["a", "b"]],
    "numbers": [[], [-1, 0.5]],
    "whole numbers": [[], [1, 8]],
    "counts": [{}, {"W1A8": 12}],
    "metrics": [{}, {"hard": {"accuracy": 0.5}}],
    "latency": [{"batch": 1, "rounds": 3, "machine": "m", "milliseconds": {"a": 1.0}, "spread": {"a": 0.1}}],
    "errors": [{}, {"layer": {"before": 0.5, "after": 0.25}}],
    "object": [{}, {"a": [1, None, {"b": "c"}]}],
    "files": [{}, {"model.safetensors": {"bytes": 3, "sha256": "ab" * 32}}],
}
BAD = {
    "text": ["", 1, b"a"],
    "digest": ["0" * 63, "G" * 64, "0" * 64 + "\n", 0],
    "whole number": [-1, 1.0, True, "1"],
    "number": [math.nan, math.inf, True, "1"],
    "yes or no": [0, "yes"],
    "texts": ["a", ("a",), [1], [""]],
    "numbers": [[math.nan], [True], 1],
    "whole numbers": [[1.5], [-1], 1],
    "counts": [{"a": -1}, {1: 1}, {"": 1}, []],
    "metrics": [{"hard": 1}, {"hard": {"accuracy": math.nan}}],
    "latency": [{}, {"batch": 1, "rounds": 3, "machine": "m", "milliseconds": {"a": 1.0}, "spread": {"b": 0.1}}],
    "errors": [{"layer": {"before": 0.5}}, {"layer": {"before": math.nan, "after": 0.1}}, []],
    "object": [{"a": math.nan}, {"a": {1}}, {1: "a"}, []],
    "files": [{"a": {"bytes": 1}}, {"a": {"bytes": 1, "sha256": "0"}}, {"a": {"bytes": -1, "sha256": "ab" * 32}}, []],
}


def test_every_kind_knows_its_own():
    for kind in KINDS:
        assert all(KINDS[kind].check(value) for value in GOOD[kind])
        assert not any(KINDS[kind].check(value) for value in BAD[kind])
        assert all(isinstance(KINDS[kind].show(value), str) for value in GOOD[kind])


SHOWN = [
    ("text", None, "unknown"),
    ("texts", [], "none"),
    ("counts", {}, "none"),
    ("whole number", 1234567, "1,234,567"),
    ("number", 2.35487, "2.355"),
    ("number", 32, "32"),
    ("yes or no", False, "no"),
    ("numbers", [-1.0, 1.0], "-1, 1"),
    ("object", {"end": None, "bf16": False}, "end: none, bf16: False"),
    ("counts", {"W1A8": 12, "W32A32": 2}, "W1A8: 12, W32A32: 2"),
    ("files", {"a": {"bytes": 4096, "sha256": "ab" * 32}}, f"a: 4,096 bytes, SHA-256 {'ab' * 32}"),
]


def test_values_as_text():
    for kind, value, text in SHOWN:
        assert Field("name", kind, "").text(value) == text


def test_what_is_wrong_is_named():
    fields = (Field("a", "number", ""), Field("b", "text", ""))
    assert problems(fields, {"a": None, "b": "x"}, complete=True) == []
    assert problems(fields, {"a": 1}, complete=False) == []
    assert problems(fields, {"a": "1", "c": 2}, complete=True) == [
        "b is missing; say null if it is unknown",
        "'c' is no field",
        "a must be number or null, not '1'",
    ]


def test_markdown():
    assert cell("a | b\n c") == r"a \| b c"
    lines = field_table([Field("a", "text", "x|y")]).splitlines()
    assert lines == ["| field | kind | meaning |", "|---|---|---|", r"| `a` | text | x\|y |"]


def test_a_backslash_undoes_nothing():
    assert line(r"\[click](https://example.org)") == r"\\\[click](https\://example.org)"


ESCAPED = [
    ("see http://evil.example", r"see http\://evil.example"),
    ("HTTPS://x www.evil.example", r"HTTPS\://x www\.evil.example"),
    ("mailto:a@b.example", r"mailto\:a<!-- -->@b.example"),
    ("`x` **b** _i_ ~~s~~ $m$", r"\`x\` \*\*b\*\* \_i\_ \~\~s\~\~ \$m\$"),
    ("snake_case_name @ 2", "snake_case_name @ 2"),
    ("<b>&lt;i&#105; AT&T", "&lt;b>&amp;lt;i&amp;#105; AT&T"),
    ("a\x00\x1b[2J\u202eb", r"a\\x00\\x1b\[2J\\u202eb"),
]


def test_what_gfm_reads_is_escaped():
    for text, written in ESCAPED:
        assert line(text) == written


def test_long_names_and_lists_are_cut():
    for kind, value in (
        ("text", "x" * 10**5),
        ("texts", ["x" * 10**5] * 10**3),
        ("counts", {f"{i}{'x' * 999}": 1 for i in range(10**4)}),
        ("numbers", [1.5] * 10**5),
        ("object", {"a": "x" * 10**5, "b": ["x"] * 10**5}),
        ("errors", {"x" * 10**5: {"before": 1.0, "after": 1.0}}),
    ):
        assert len(Field("a", kind, "b").text(value)) < 30_000
    [problem] = problems([Field("a", "number", "b")], {"a": "x" * 10**6}, complete=True)
    assert len(problem) < 300
