"""Streams that are looked at before they are read."""

import copy
from itertools import islice

import pytest
from torch.utils.data import DataLoader, IterableDataset

from proxbit.training.lookahead import Lookahead, is_used_up


class Once(IterableDataset):
    """Its iterator is always the same one."""

    shards = 3

    def __init__(self, count=10):
        self.rest = iter(range(1, count + 1))

    def __iter__(self):
        return self.rest


class Hidden(Once):
    """As `Once`, but each reading looks like one of its own."""

    def __iter__(self):
        yield from self.rest


class Again(IterableDataset):
    def __iter__(self):
        return iter(range(1, 11))

    def __len__(self):
        return 10


ALL = list(range(1, 11))


@pytest.mark.parametrize("kind", [Once, Hidden, Again])
@pytest.mark.parametrize("looked", [0, 1, 4, 10, 20])
def test_reading_begins_with_what_was_looked_at(kind, looked):
    stream = Lookahead(kind())
    for count in (looked, looked // 2):
        assert list(islice(iter(stream.look()), count)) == ALL[:count]
    assert list(stream) == ALL
    assert list(stream) == (ALL if kind is Again else [])


def test_batches_of_a_look_take_no_more_than_they_hold():
    source = Once()
    stream = Lookahead(source)
    assert [batch.tolist() for batch in islice(DataLoader(stream.look(), 2), 2)] == [[1, 2], [3, 4]]
    assert next(source.rest) == 5


def test_it_answers_as_its_stream_does():
    assert Lookahead(Once()).shards == 3 and len(Lookahead(Again())) == 10
    with pytest.raises(TypeError):
        len(Lookahead(Once()))
    with pytest.raises(AttributeError):
        assert Lookahead(Once()).nothing
    assert list(copy.copy(Lookahead(Again()))) == ALL


@pytest.mark.parametrize("kind", [Once, Hidden])
def test_what_is_used_up(kind):
    stream = kind()
    list(stream)
    assert is_used_up(stream)
    assert not is_used_up(Again())
