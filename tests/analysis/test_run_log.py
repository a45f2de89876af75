"""The file of a run: what is written is read, whatever happened in between."""

import json
import math

import numpy as np
import pytest

from proxbit.analysis.run_log import RUN_LOG, append_event, read_log, replace_event, start_log
from proxbit.errors import CheckpointError
from run_folder import RUN, write_run


def test_what_is_written_is_read(tmp_path):
    log = read_log(write_run(tmp_path))
    assert {key: log.run[key] for key in RUN} == RUN
    assert [row["step"] for row in log.logs] == [10, 10, 20, 20, 30, 30, 40, 40]
    assert [row["step"] for row in log.layers] == [0, 10, 20, 30, 40]
    assert log.predictions["total"] == 7
    lines = (tmp_path / RUN_LOG).read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_a_folder_is_made(tmp_path):
    start_log(tmp_path / "new" / "out", RUN)
    assert read_log(tmp_path / "new" / "out").logs == ()


def test_what_is_no_number_is_null(tmp_path):
    start_log(tmp_path, RUN)
    append_event(tmp_path, {"event": "log", "step": 1, "loss": math.nan, "grad_norm": math.inf, "mu": 1.0})
    (row,) = read_log(tmp_path).logs
    assert (row["loss"], row["grad_norm"], row["mu"]) == (None, None, 1.0)
    assert "NaN" not in (tmp_path / RUN_LOG).read_text()


def test_resuming_keeps_what_happened_before(tmp_path):
    """What lies behind the checkpoint is done again, so it goes; the first line is that of the new process."""
    write_run(tmp_path)
    start_log(tmp_path, RUN | {"steps": 60}, step=20)
    log = read_log(tmp_path)
    assert log.run["steps"] == 60
    assert [row["step"] for row in log.logs] == [10, 10, 20, 20]
    assert [row["step"] for row in log.layers] == [0, 10, 20]
    assert log.predictions is None


def test_beginning_anew_keeps_nothing(tmp_path):
    start_log(write_run(tmp_path), RUN)
    assert (read_log(tmp_path).logs, read_log(tmp_path).layers) == ((), ())


def test_a_line_is_replaced(tmp_path):
    write_run(tmp_path)
    size = (tmp_path / RUN_LOG).stat().st_size
    for right in (1, 2):
        replace_event(tmp_path, {"event": "predictions", "step": 40, "right": right, "pictures": []})
    log = read_log(tmp_path)
    assert log.predictions["right"] == 2
    assert len(log.logs) == 8
    assert (tmp_path / RUN_LOG).stat().st_size < size
    assert [path.name for path in tmp_path.iterdir()] == [RUN_LOG]


def test_a_process_that_was_killed_in_the_middle_of_a_line(tmp_path):
    write_run(tmp_path)
    with (tmp_path / RUN_LOG).open("a") as file:
        file.write('{"event":"log","step":50,"lo')
    assert len(read_log(tmp_path).logs) == 8
    start_log(tmp_path, RUN, step=40)
    append_event(tmp_path, {"event": "log", "step": 50, "loss": 1.0})
    assert read_log(tmp_path).logs[-1]["loss"] == 1.0


def test_events_of_other_kinds_are_passed_over(tmp_path):
    write_run(tmp_path)
    append_event(tmp_path, {"event": "weather", "step": 40, "sun": True})
    assert len(read_log(tmp_path).logs) == 8


def test_so_is_what_is_none_inside_of_lists(tmp_path):
    """As the metrics of segmentation, a number a class, where a class is in no picture."""
    start_log(tmp_path, RUN)
    metrics = {"iou": [0.5, math.nan], "by": {"a": math.inf}, "array": np.array([[1.0, np.nan]]), "one": np.float32(2)}
    append_event(tmp_path, {"event": "log", "step": 1, **metrics})
    (row,) = read_log(tmp_path).logs
    found = [row[key] for key in metrics]
    assert found == [[0.5, None], {"a": None}, [[1.0, None]], 2.0]


DAMAGED = [
    ("", "does not begin with the line of a run"),
    ('{"event":"log","step":1}\n', "does not begin with the line of a run"),
    ('{"event":"run","format":2,"step":0}\n', "has format 2; this version of proxbit reads 1"),
    ('{"event":"run","format":1,"step":0}\nhello\n', "line 2: not JSON"),
    ('{"event":"run","format":1,"step":0}\n[]\n', "line 2: an event has"),
    ('{"event":"run","format":1,"step":0}\n{"event":"log","step":"1"}\n', "line 2: an event has"),
]


def test_a_damaged_file_is_refused(tmp_path):
    for text, words in DAMAGED:
        (tmp_path / RUN_LOG).write_text(text)
        with pytest.raises(CheckpointError, match=words):
            read_log(tmp_path)


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / RUN_LOG).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="is damaged: it is no text"):
        read_log(tmp_path)


def test_a_folder_without_the_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=f"is not the output folder of a run: it holds no {RUN_LOG}"):
        read_log(tmp_path)
    with pytest.raises(CheckpointError, match="is not the output folder of a run"):
        read_log(tmp_path / "nowhere")
