"""Rows of weights that are spread over two processes: right numbers, and what is sent for them."""

import pytest

from shard_runs import broken_rows, compare, grouped, positives

pytestmark = pytest.mark.xdist_group("processes")


def test_rows_that_are_whole_cost_nothing(processes):
    """Spread by rows, as FSDP2 does it. Only normalize="tensor" asks the other processes, for one number."""
    for answers in processes(compare, 0):
        for case, difference, same, sent in answers:
            assert difference < 1e-6 and same, case
            assert sent == ([1, 1] if case[1] == "tensor" else [0, 0]), case


def test_rows_that_are_spread_in_groups(processes):
    """Each group has all of them, as under hybrid sharding."""
    for answers in processes(grouped):
        for case, difference, same, sent in answers:
            assert difference < 1e-6 and same, case
            assert sent == [0, 0] or case[1] == "tensor", case


def test_columns_come_together(processes):
    """Spread by columns, as tensor parallelism does it."""
    for answers in processes(compare, 1):
        for case, difference, same, _ in answers:
            assert difference < 1e-6 and same, case


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_every_process_says_what_is_wrong(processes, dim):
    for message in processes(broken_rows, dim):
        assert message.startswith("w: 1 of 7 rows hold NaN or infinite values (first: row 5)")


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_counts_are_of_all_rows(processes, dim):
    for counted, expected in processes(positives, dim):
        assert counted == expected
