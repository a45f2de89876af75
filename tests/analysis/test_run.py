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


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"epoch": 3}, r"'epoch' is no field.* Fields: model_id, base_model, "),
        ({"epochs": "3"}, "epochs must be number or null, not '3'"),
        ({"metrics": {"binary": {"accuracy": 0.5}}}, f"'binary' is no variant; valid: {', '.join(VARIANTS)}"),
        ({"latency": {"milliseconds": 3}}, "latency must be latency or null"),
    ],
    ids=["unknown field", "wrong kind", "unknown variant", "latency"],
)
def test_refusals(run, message):
    with pytest.raises(CardError, match=message):
        check_run(run)
