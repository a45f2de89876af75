"""Labels from metadata files: what is read as numbers, what as text, and what is refused."""

import datasets
import pytest

from proxbit.errors import DataError
from proxbit.training.layouts import read_labels


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file_name,label\na,1\nb,2\n", [("a", 1), ("b", 2)]),
        ("\ufefffile_name,label\na,1\n", [("a", 1)]),
        ("label,file_name,more\n1,a,x\ntwo,b,y\n", [("a", "1"), ("b", "two")]),
        ('file_name,labels\n"a,\nb",true\n', [("a,\nb", "true")]),
        ("file_name,label\na,\nb,3\n", [("a", None), ("b", 3)]),
    ],
)
def test_rows_of_a_table(tmp_path, text, expected):
    (tmp_path / "metadata.csv").write_text(text)
    assert read_labels(tmp_path / "metadata.csv") == expected


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_formats(tmp_path, kind):
    file = tmp_path / f"metadata.{kind}"
    table = datasets.Dataset.from_dict({"file_name": ["a", "b"], "label": [3, None]})
    table.to_json(file) if kind == "jsonl" else table.to_parquet(file)
    assert read_labels(file) == [("a", 3), ("b", None)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.csv", b"file_name,place\na,b\n", "has no columns 'file_name' and 'label'"),
        ("metadata.csv", b"label\nb\n", "has no columns"),
        ("metadata.csv", b"file_name,label,label\na,b,c\n", "has no columns"),
        ("metadata.csv", b"\xff\x80,\x81\n1,2\n", "cannot be read"),
        ("metadata.csv", b"", "cannot be read"),
        ("metadata.csv", b"file_name,label\na\n", "cannot be read"),
        ("metadata.jsonl", b"{", "cannot be read"),
        ("metadata.jsonl", b'{"file_name": "a", "label": 1.5}', "not text, or numbers"),
        ("metadata.jsonl", b'{"file_name": "a", "label": true}', "not text, or numbers"),
        ("metadata.jsonl", b'{"file_name": 1, "label": 1}', "not text, or numbers"),
        ("metadata.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_what_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as refused:
        read_labels(tmp_path / name)
    assert str(refused.value).isprintable()
