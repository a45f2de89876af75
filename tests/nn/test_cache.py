"""A value is computed once, and again when one of its tensors changed."""

import copy
import pickle

import torch

from proxbit.nn.cache import TensorCache


def test_made_once_until_something_changes():
    cached, tensors, made = TensorCache(), [torch.ones(2), None, torch.zeros(3)], []

    def make():
        made.append(float(sum(t.sum() for t in tensors if t is not None)))
        return made[-1]

    assert cached(tensors, make) == cached(tensors, make) == 2.0 and len(made) == 1
    tensors[0].mul_(2)
    assert cached(tensors, make) == 4.0 and len(made) == 2
    tensors[2] = torch.ones(3)
    assert cached(tensors, make) == 7.0 and len(made) == 3
    tensors[1] = torch.ones(1)
    assert cached(tensors, make) == 8.0 and cached(tensors, make) == 8.0 and len(made) == 4
    for again in (copy.deepcopy(cached), pickle.loads(pickle.dumps(cached))):
        again(tensors, make)
    assert len(made) == 6


def test_of_tensors_whose_changes_nobody_counts_nothing_is_kept():
    with torch.inference_mode():
        tensor = torch.ones(2)
    cached, made = TensorCache(), []
    for _ in range(3):
        cached([tensor], lambda: made.append(1))
    assert len(made) == 3


def test_what_is_made_in_inference_mode_outlives_it():
    cached, tensor = TensorCache(), torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        made = cached([tensor], lambda: tensor * 2)
    assert not made.is_inference() and not made.requires_grad and made._version == 0
    assert cached([tensor], lambda: None) is made


def test_another_tensor_in_the_same_place_is_another_one():
    """As the allocator gives a new tensor the memory of one that was just freed."""
    memory, made = torch.ones(4), []
    cached = TensorCache()
    for value in range(3):
        tensor = torch.from_numpy(memory.numpy())
        tensor.numpy()[:] = value
        cached([tensor], lambda tensor=tensor: made.append(float(tensor[0])))
        del tensor
    assert made == [0.0, 1.0, 2.0]
