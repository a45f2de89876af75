"""What a ProxConnect keeps and hands over: its state, its copies, latent weights and hard ones."""

import copy
import pickle

import pytest
import torch

from proxbit import BinarizationConfig, binarize, pack
from proxbit.errors import CheckpointError
from wrapped_network import OPTIMIZERS, backward, groups, network, wrapped


@pytest.fixture(scope="module")
def data(crops):
    pixels = crops(12, 3).flatten(1).double()
    return pixels, torch.arange(12) % 3


def test_state_resumes_bit_for_bit(data):
    model = network()
    optimizer = wrapped(model, "parq", "adamw")
    run = {}
    for step in range(10):
        if step == 5:
            run = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        backward(model, data)
        optimizer.step()
    again = network()
    resumed = wrapped(again, "parq", "adamw")
    again.load_state_dict(run[0])
    resumed.load_state_dict(run[1])
    for _ in range(5):
        backward(again, data)
        resumed.step()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (resumed.steps, resumed.mu) == (optimizer.steps, optimizer.mu)


def test_state_of_something_else_is_refused(data):
    model = network()
    optimizer = wrapped(model)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match="without 'proxconnect'"):
        optimizer.load_state_dict(OPTIMIZERS["sgd"](groups(network())).state_dict())
    other = copy.deepcopy(before)
    other["proxconnect"]["latents"].pop()
    with pytest.raises(CheckpointError, match=r"shapes \[\[9, 27\]\]; expected \[\[9, 27\], \[3, 9\]\]"):
        optimizer.load_state_dict(other)
    assert torch.equal(optimizer.duals[1].latent, before["proxconnect"]["latents"][1])


def test_harden_leaves_what_pack_stores(data):
    """The parameters are plus and minus a row scale, and stay so; packed, the model computes the same."""
    model = network()
    optimizer = wrapped(model)
    for _ in range(3):
        backward(model, data)
        optimizer.step()
    optimizer.harden()
    backward(model, data)
    optimizer.step()
    for weight in (model[0].weight, model[2].weight):
        size = weight.abs()
        torch.testing.assert_close(size, size[:, :1].expand_as(size), rtol=1e-14, atol=0)
    with torch.no_grad():
        expected = model(data[0])
    pack(binarize(model, BinarizationConfig(include=["0", "2"])))
    torch.testing.assert_close(model(data[0]), expected, rtol=0, atol=1e-12)


def test_latent_weights_are_lent_to_the_parameters(data):
    model = network()
    start = [p.detach().clone() for p in (model[0].weight, model[2].weight)]
    optimizer = wrapped(model)
    soft = model[0].weight.detach().clone()
    with optimizer.latent_weights():
        assert torch.equal(model[0].weight, start[0])
        assert torch.equal(model[2].weight, start[1])
    assert torch.equal(model[0].weight, soft)
    assert not torch.equal(soft, start[0])


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_copy_goes_on_by_itself(optimizer, duplicate, data):
    """With its model: the same steps as the original, in parameters, groups and state of its own."""
    model = network()
    original = wrapped(model, "parq", optimizer)
    backward(model, data)
    original.step()
    twin_model, twin = duplicate((model, original))
    assert twin.duals[0].parameter is twin_model[0].weight is twin.param_groups[0]["params"][0]
    assert twin.param_groups is twin.base.param_groups is not original.param_groups
    before = copy.deepcopy(model.state_dict())
    backward(twin_model, data)
    twin.step()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    backward(model, data)
    original.step()
    for one, other in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (twin.steps, twin.mu, twin.is_hard) == (original.steps, original.mu, False)


def test_groups_and_state_are_those_of_the_base_optimizer(data):
    """Also where the base optimizer makes new ones, when it loads."""
    model = network()
    optimizer = wrapped(model)
    backward(model, data)
    optimizer.step()
    optimizer.base.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    assert len(optimizer.state) == 4
