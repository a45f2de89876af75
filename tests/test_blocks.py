"""Rows in blocks: all of them, once, in order."""

import pytest
import torch

from proxbit import blocks
from proxbit.blocks import row_blocks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rows", "width", "count"), [(10, 4, 4), (9, 4, 3), (2, 4, 1), (5, 100, 5), (0, 4, 1), (3, 0, 1)]
)
def test_every_row_once(rows, width, count, monkeypatch):
    """Of 12 elements each, or of one row where that has more."""
    monkeypatch.setattr(blocks, "BLOCK", 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with torch.no_grad():
        found = row_blocks(rows, width, CPU)
    assert len(found) == count
    assert [row for block in found for row in range(rows)[block]] == list(range(rows))


def test_threads_share_a_block(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with torch.no_grad():
        assert row_blocks(12, 4, CPU) == [slice(0, 9), slice(9, 18)]


def test_one_block_on_accelerators_and_where_autograd_records(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1)
    with torch.no_grad():
        assert row_blocks(5, 4, torch.device("cuda")) == [slice(None)]
    assert row_blocks(5, 4, CPU) == [slice(None)]
