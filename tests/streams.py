"""Streams of examples, of which some can be read only once."""

from torch.utils.data import IterableDataset


class Once(IterableDataset):
    """Its iterator is always the same one."""

    shards = 3

    def __init__(self, examples):
        self.rest = iter(examples)

    def __iter__(self):
        return self.rest


class Endless(Once):
    """As `Once`, but each reading looks like one of its own."""

    def __iter__(self):
        yield from self.rest


class Again(IterableDataset):
    """As often as one likes."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)
