"""Records of runs: complete after the check, refused when they say what nobody reads."""

import json

import pytest

from proxbit.analysis.run import RUN_FIELDS, VARIANTS, check_run
from proxbit.errors import CardError


def test_what_is_not_said_is_null():
    record = check_run({"epochs": 3, "metrics": {"hard": {"accuracy": 0.5}}})
    assert list(record) == [field.name for field in RUN_FIELDS]
    assert {name for name, value in record.items() if value is not None} == {"epochs", "metrics"}
    assert check_run(None) == dict.fromkeys(record)
    assert json.loads(json.dumps(record)) == record


REFUSED = [
    ({"epoch": 3}, r"'epoch' is no field.* Fields: model_id, base_model, "),
    ({"epochs": "3"}, "epochs must be number or null, not '3'"),
    ({"metrics": {"binary": {"accuracy": 0.5}}}, f"'binary' is no variant; valid: {', '.join(VARIANTS)}"),
    ({"latency": {"milliseconds": 3}}, "latency must be latency or null"),
]


def test_refusals():
    for run, message in REFUSED:
        with pytest.raises(CardError, match=message):
            check_run(run)


PLACES = [
    ("/home/me/patients", "patients"),
    ("/home/me/my patients/", "my patients"),
    ("~/patients", "patients"),
    ("../patients", "patients"),
    ("C:\\Users\\me\\patients", "patients"),
    ("\\\\server\\me\\patients", "patients"),
    ("/", "data"),
    ("train --data /home/me/patients --teacher=/srv/me/vit", "train --data patients --teacher=vit"),
    ("me/vit", "me/vit"),
    ("https://example.org/a/b", "https://example.org/a/b"),
    ("Xeon @ 2.5 GHz, and/or 4 / s", "Xeon @ 2.5 GHz, and/or 4 / s"),
]


def test_a_record_tells_no_places():
    """In any field, at any depth."""
    for text, told in PLACES:
        run = {
            "dataset": text,
            "teacher": text,
            "base_model": text,
            "arguments": {"a": [{"b": text}]},
            "environment": {"c": text},
        }
        found = check_run(run)
        assert [found["dataset"], found["teacher"], found["base_model"], found["environment"]["c"]] == [told] * 4
        assert found["arguments"]["a"][0]["b"] == told


def test_a_folder_that_is_there_is_called_by_its_name(tmp_path, monkeypatch):
    """Also where it looks like a name on the Hub."""
    (tmp_path / "me" / "patients").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "me")
    assert check_run({"dataset": "."})["dataset"] == "me"
    names = (str(tmp_path / "me" / "patients"), "../me/patients/", "patients")
    assert {check_run({"dataset": name})["dataset"] for name in names} == {"patients"}
    assert check_run({"dataset": "user/set"})["dataset"] == "user/set"
    monkeypatch.chdir(tmp_path)
    assert check_run({"dataset": "me/patients"})["dataset"] == "patients"
    assert check_run({"dataset": "me/others"})["dataset"] == "me/others"
