"""Streams that are looked at before they are read."""

import copy
from itertools import islice

import pytest
from torch.utils.data import DataLoader

from proxbit.training.lookahead import Lookahead, is_used_up
from streams import Again, Endless, Once


class Counted(Again):
    def __len__(self):
        return len(self.examples)


ALL = list(range(1, 11))


@pytest.mark.parametrize(
    ("kind", "looked"), [(Once, 0), (Once, 4), (Endless, 1), (Endless, 20), (Counted, 4), (Counted, 10)]
)
def test_reading_begins_with_what_was_looked_at(kind, looked):
    stream = Lookahead(kind(ALL))
    for count in (looked, looked // 2):
        assert list(islice(iter(stream.look()), count)) == ALL[:count]
    assert list(stream) == ALL
    assert list(stream) == (ALL if kind is Counted else [])


def test_batches_of_a_look_take_no_more_than_they_hold():
    source = Once(ALL)
    stream = Lookahead(source)
    assert [batch.tolist() for batch in islice(DataLoader(stream.look(), 2), 2)] == [[1, 2], [3, 4]]
    assert next(source.rest) == 5


def test_it_answers_as_its_stream_does():
    assert Lookahead(Once(ALL)).shards == 3 and len(Lookahead(Counted(ALL))) == 10
    with pytest.raises(TypeError):
        len(Lookahead(Once(ALL)))
    with pytest.raises(AttributeError):
        assert Lookahead(Once(ALL)).nothing
    assert list(copy.copy(Lookahead(Counted(ALL)))) == ALL


@pytest.mark.parametrize("kind", [Once, Endless])
def test_what_is_used_up(kind):
    stream = kind(ALL)
    list(stream)
    assert is_used_up(stream)
    assert not is_used_up(Counted(ALL))
