"""What a ProxConnect keeps and hands over: its state, its copies, latent weights and hard ones."""

import copy
import math
import pickle

import pytest
import torch

from proxbit import BinarizationConfig, binarize, dequantize, pack
from proxbit.errors import CheckpointError
from proxbit.quantizers import MuSchedule, get_pair
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


DAMAGES = {
    "no steps": (lambda own: own.pop("steps"), r"lacks steps \(int\)"),
    "no latents": (lambda own: own.pop("latents"), r"lacks latents \(list\)"),
    "half a step": (lambda own: own.update(steps=2.5), r"lacks steps \(int\), or has another type"),
    "negative steps": (lambda own: own.update(steps=-1), "holds -1 steps"),
    "hardened by a word": (lambda own: own.update(hardened="no"), r"lacks hardened \(bool\)"),
    "one mu": (lambda own: own["mu"].pop(), "holds 1 values of mu; expected 2"),
    "infinite mu": (lambda own: own["mu"].__setitem__(1, math.inf), "mu = inf is out of range"),
    "mu of no number": (lambda own: own["mu"].__setitem__(1, math.nan), "mu = nan is out of range"),
    "mu out of range": (lambda own: own["mu"].__setitem__(1, 0.5), "mu = 0.5 is out of range"),
    "mu in words": (lambda own: own["mu"].__setitem__(1, "one"), "not one of this pair"),
    "a latent of no tensor": (lambda own: own["latents"].__setitem__(1, None), r"shapes \[\[9, 27\], \[\]\]; expected"),
    "nan": (lambda own: own["latents"][1][2].fill_(math.nan), "Latent weight 1 of the state holds NaN"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_changes_nothing(damage, words, data):
    refuse_after(lambda state: damage(state["proxconnect"]), words, data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("param_groups"), "not one of SGD: KeyError"),
        (lambda state: state["param_groups"].pop(), "not one of SGD: ValueError.*parameter groups"),
        (lambda state: state["param_groups"][0]["params"].pop(), "not one of SGD: ValueError"),
        (lambda state: state["param_groups"][1].pop("momentum"), "not one of SGD: KeyError.*momentum"),
    ],
    ids=["no groups", "one group", "one parameter", "another optimizer"],
)
def test_a_state_of_another_base_optimizer_changes_nothing(change, words, data):
    refuse_after(change, words, data)


def refuse_after(change, words, data):
    """Load a changed state of three steps into a ProxConnect of one step."""
    state = trained(data, 3)[1].state_dict()
    change(state)
    model, optimizer = trained(data, 1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(CheckpointError, match=words):
        optimizer.load_state_dict(state)
    torch.testing.assert_close((dict(model.state_dict()), optimizer.state_dict()), (dict(before[0]), before[1]))


def trained(data, steps, pair="parq", optimizer="sgd", **arguments):
    model = network()
    wrapper = wrapped(model, pair, optimizer, **arguments)
    for _ in range(steps):
        backward(model, data)
        wrapper.step()
    return model, wrapper


def test_a_state_of_sgd_is_refused_by_adamw(data):
    """AdamW notices only after it has put the state in its place: that is taken back."""
    _, optimizer = trained(data, 1, optimizer="adamw")
    state, moments = optimizer.state, copy.deepcopy(optimizer.base.state_dict())
    with pytest.raises(CheckpointError, match="not one of AdamW"):
        optimizer.load_state_dict(trained(data, 3)[1].state_dict())
    assert optimizer.state is state
    torch.testing.assert_close(optimizer.base.state_dict(), moments)


def test_with_a_schedule_mu_is_that_of_the_schedule(data):
    """The state of a run without one, or with another one."""
    model, optimizer = trained(data, 0, schedule=MuSchedule("linear", 1, 11, 11))
    optimizer.load_state_dict(trained(data, 3)[1].state_dict())
    assert (optimizer.steps, optimizer.mu) == (3, 4.0)
    units = optimizer.duals[0].latent.abs().mean(1, keepdim=True)
    q = get_pair("parq").forward(optimizer.duals[0].latent / units, 4.0)
    ratio = model[0].weight.detach() / q
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-9, atol=0)


@pytest.mark.parametrize("pair", ["dorefa", "xnor", "adabin", "bnn++", "proxquant"])
def test_packed_from_the_latents_are_the_hard_weights(pair, data):
    """For every kind of units."""
    model, optimizer = trained(data, 3, pair, schedule=MuSchedule(*get_pair(pair).schedule, steps=9))
    optimizer.harden()
    hard = [model[place].weight.detach().clone() for place in (0, 2)]
    expected = model(data[0]).detach()
    with optimizer.latent_weights():
        pack(binarize(model, BinarizationConfig(weights=pair, include=["0", "2"])))
    torch.testing.assert_close(model(data[0]), expected, rtol=0, atol=1e-12)
    dequantize(model)
    for place, weight in zip((0, 2), hard, strict=True):
        torch.testing.assert_close(model[place].weight.detach(), weight, rtol=0, atol=1e-14)


@pytest.mark.parametrize("pair", ["xnor", "adabin"])
def test_hard_weights_that_are_centred_again_change(pair, data):
    model, optimizer = trained(data, 3, pair)
    optimizer.harden()
    expected = model(data[0]).detach()
    pack(binarize(model, BinarizationConfig(weights=pair, include=["0", "2"])))
    assert (model(data[0]) - expected).abs().max() > 1e-3


def test_what_is_written_into_latent_weights_is_lost(data):
    model, optimizer = trained(data, 1)
    weight, latent = model[0].weight.detach().clone(), optimizer.duals[0].latent.clone()
    with optimizer.latent_weights(), torch.no_grad():
        model[0].weight.fill_(7)
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(optimizer.duals[0].latent, latent)


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
