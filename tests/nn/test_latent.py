"""What latent layers share: soft and hard forwards, mu, checks of the latent weight."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from proxbit.errors import LatentError, MuRangeError
from proxbit.nn import (
    BinaryConv2d,
    BinaryLinear,
    LatentWeight,
    evaluating,
    latent_layers,
    set_mu,
    soft_evaluation,
    start_update,
)
from proxbit.quantizers import compose, get_pair
from proxbit.quantizers.functions import SIGN


class Net(nn.Module):
    """A latent convolution and a latent linear layer, with a float layer between."""

    def __init__(self, pair="bnn++"):
        super().__init__()
        self.patches = BinaryConv2d(pair=get_pair(pair), in_channels=3, out_channels=5, kernel_size=4, stride=4)
        self.norm = nn.GroupNorm(1, 5)
        self.head = nn.Sequential(nn.Linear(5, 6), BinaryLinear(6, 3, pair=get_pair(pair)))

    def forward(self, pixels):
        return self.head(self.norm(self.patches(pixels)).mean(dim=(2, 3)))


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def pixels(crops):
    return crops(2, 16)


def rows_of(weight):
    return weight.detach().double().numpy().reshape(len(weight), -1)


def hard(weight):
    """Signs times the mean |w| of the row."""
    rows = rows_of(weight)
    result = np.where(rows >= 0, 1.0, -1.0) * np.abs(rows).mean(axis=1, keepdims=True)
    return torch.from_numpy(result.reshape(weight.shape)).float()


def soft(weight, mu):
    """Sign-Swish of the row in units of its mean |w|, times the least-squares factor."""
    rows = rows_of(weight)
    half = mu * rows / np.abs(rows).mean(axis=1, keepdims=True) / 2
    q = np.tanh(half) + half / np.cosh(half) ** 2
    result = q * (q * rows).sum(axis=1, keepdims=True) / (q * q).sum(axis=1, keepdims=True)
    return torch.from_numpy(result.reshape(weight.shape)).float()


def test_latent_layers_are_found_by_name(net):
    assert dict(latent_layers(net)) == {"patches": net.patches, "head.1": net.head[1]}
    assert all(isinstance(layer, LatentWeight) for _, layer in latent_layers(net))
    assert list(latent_layers(nn.Linear(2, 2))) == []
    assert [name for name, _ in latent_layers(net.patches)] == [""]


def test_mu_starts_where_the_schedule_of_the_pair_does():
    for pair, start in {"bnn++": 0.3, "bc": 1.0, "pc": 0.01, "parq": 1.0}.items():
        layer = BinaryLinear(4, 2, pair=get_pair(pair))
        assert layer.mu.item() == start
        assert (layer.mu.dim(), layer.mu.device.type) == (0, "cpu")


def test_training_is_soft_until_hardened_and_evaluation_is_hard(net):
    set_mu(net, 1.7)
    for _, layer in latent_layers(net):
        assert not layer.is_hard
        torch.testing.assert_close(layer.effective_weight(), soft(layer.weight, 1.7), rtol=1e-5, atol=1e-6)
    net.eval()
    for _, layer in latent_layers(net):
        assert layer.is_hard
        torch.testing.assert_close(layer.effective_weight(), hard(layer.weight), rtol=1e-6, atol=0)
    net.train()
    set_mu(net, 1.7, hard=True)
    for _, layer in latent_layers(net):
        assert layer.is_hard
        torch.testing.assert_close(layer.effective_weight(), hard(layer.weight), rtol=1e-6, atol=0)
    set_mu(net, 1.7)
    assert not any(layer.is_hard for _, layer in latent_layers(net))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_effective_weight_can_be_asked_for_either(net, training):
    net.train(training)
    for _, layer in latent_layers(net):
        torch.testing.assert_close(layer.effective_weight(hard=True), hard(layer.weight), rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.effective_weight(hard=False), soft(layer.weight, 0.3), rtol=1e-5, atol=1e-6)


def test_effective_weight_carries_the_gradient_to_the_latent(net, pixels):
    net(pixels).square().sum().backward()
    for _, layer in latent_layers(net):
        assert layer.weight.grad.shape == layer.weight.shape
        assert layer.weight.grad.abs().min() > 0


def test_hardened_training_still_has_gradients(net, pixels):
    set_mu(net, 1.0, hard=True)
    net(pixels).square().sum().backward()
    assert all(layer.weight.grad.abs().max() > 0 for _, layer in latent_layers(net))


def test_row_scale_is_the_mean_absolute_weight(net):
    for _, layer in latent_layers(net):
        np.testing.assert_allclose(
            layer.hard_rows().scale.numpy(), np.abs(rows_of(layer.weight)).mean(axis=1), rtol=1e-6
        )


@pytest.mark.parametrize(("pair", "hardened"), [("proxquant", False), ("rpc", True), ("bnn++", False), ("pc", True)])
def test_start_update(pair, hardened):
    """Up to mu nearer to +-1 in row units, the sign once hard, in the same parameter; else nothing happens."""
    net = Net(pair)
    set_mu(net, 0.3, hard=hardened)
    parameters = [layer.weight for _, layer in latent_layers(net)]
    before = [rows_of(weight).copy() for weight in parameters]
    for weight in parameters:
        weight.grad = torch.ones_like(weight)
    start_update(net)
    for (_, layer), parameter, rows in zip(latent_layers(net), parameters, before, strict=True):
        assert layer.weight is parameter
        if pair in ("proxquant", "rpc"):
            size = np.abs(rows) / np.abs(rows).mean(axis=1, keepdims=True)
            pulled = size + np.clip(1.0 - size, -0.3, 0.3)
            q = np.where(rows >= 0, 1.0, -1.0) * (1.0 if hardened else pulled)
            rows = q * (q * rows).sum(axis=1, keepdims=True) / (q * q).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(rows_of(parameter), rows, rtol=1e-5 if pair in ("proxquant", "rpc") else 0)


@pytest.mark.parametrize("pair", ["proxquant", "rpc"])
def test_start_update_leaves_what_the_optimizer_passes_over(pair, pixels):
    """A frozen weight, and one without a gradient; the others move."""
    net = Net(pair)
    net.patches.weight.requires_grad_(False)
    patches, head = (layer.weight.detach().clone() for _, layer in latent_layers(net))
    start_update(net)
    assert torch.equal(net.head[1].weight, head)
    net(pixels).sum().backward()
    start_update(net)
    assert torch.equal(net.patches.weight, patches)
    assert not torch.equal(net.head[1].weight, head)


def test_soft_evaluation(net, pixels):
    net.eval()
    set_mu(net, 0.5)
    before = net(pixels)
    with soft_evaluation(net):
        inside = net(pixels)
        assert not any(layer.is_hard for _, layer in latent_layers(net))
    assert not torch.allclose(inside, before)
    assert torch.equal(net(pixels), before)
    assert torch.equal(inside, net.train()(pixels))


def test_soft_evaluation_also_of_a_hardened_model(net, pixels):
    set_mu(net, 0.5, hard=True)
    net.eval()
    with soft_evaluation(net):
        weight = net.patches.effective_weight()
    torch.testing.assert_close(weight, soft(net.patches.weight, 0.5), rtol=1e-5, atol=1e-6)
    assert net.patches.is_hard


def test_soft_evaluation_does_not_change_training(net):
    with soft_evaluation(net):
        assert not net.patches.is_hard
        set_mu(net, 1.0, hard=True)
        assert net.patches.is_hard


def test_soft_evaluation_ends_with_an_exception(net):
    net.eval()
    with pytest.raises(KeyError, match="out of here"), soft_evaluation(net):
        raise KeyError("out of here")
    assert all(layer.is_hard and layer.soft_eval is False for _, layer in latent_layers(net))


def test_soft_evaluation_nests_and_restores_each_layer(net):
    net.eval()
    net.patches.soft_eval = True
    with soft_evaluation(net):
        with soft_evaluation(net):
            assert not net.head[1].is_hard
        assert not net.head[1].is_hard
    assert (net.patches.soft_eval, net.head[1].soft_eval) == (True, False)


def test_set_mu_in_place(net):
    """The same tensor, so that compiled graphs see it."""
    tensors = [layer.mu for _, layer in latent_layers(net)]
    set_mu(net, 2.5)
    assert [layer.mu is tensor for (_, layer), tensor in zip(latent_layers(net), tensors)] == [True, True]
    assert [tensor.item() for tensor in tensors] == [2.5, 2.5]
    set_mu(nn.Linear(2, 2), 3.0)


def test_mu_out_of_range_changes_nothing(net):
    set_mu(net, 2.0, hard=True)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(MuRangeError, match="out of range"):
            set_mu(net, bad)
    assert [(layer.mu.item(), layer.hardened) for _, layer in latent_layers(net)] == [(2.0, True)] * 2


def test_mu_out_of_the_range_of_one_pair_of_several_changes_no_layer(net):
    """The last layer refuses; the first would have accepted."""
    net.head[1].pair = compose(SIGN, mu_range=(3.0, 9.0), schedule=("constant", 3.0, 3.0))
    set_mu(net, 4.0)
    with pytest.raises(MuRangeError, match="mu = 2.0 is out of range: this pair takes finite values from 3 to 9"):
        set_mu(net, 2.0)
    assert [layer.mu.item() for _, layer in latent_layers(net)] == [4.0, 4.0]


def test_mu_stays_what_it_is_when_the_model_moves(net):
    set_mu(net, 2.7182818284)
    for moved in (net.half(), net.double(), net.to(torch.bfloat16), net.to("meta")):
        assert moved.patches.mu.item() == 2.7182818284
        assert moved.patches.mu.device.type == "cpu"


def test_state_dict_is_that_of_the_float_model(net):
    """Neither mu nor the pair is in it: a latent checkpoint is one of plain parameters."""
    plain = nn.ModuleDict(
        {
            "patches": nn.Conv2d(3, 5, 4),
            "norm": nn.GroupNorm(1, 5),
            "head": nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)),
        }
    )
    assert list(net.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(net.state_dict())
    other = Net()
    other.load_state_dict(plain.state_dict())
    for (name, one), (_, two) in zip(net.named_parameters(), other.named_parameters()):
        assert torch.equal(one, two), name


def test_a_deep_copy_is_independent(net, pixels):
    set_mu(net, 2.0)
    twin = copy.deepcopy(net)
    before = net(pixels)
    assert torch.equal(twin(pixels), before)
    set_mu(twin, 9.0, hard=True)
    with torch.no_grad():
        twin.patches.weight.mul_(-1)
    assert [(layer.mu.item(), layer.hardened) for _, layer in latent_layers(net)] == [(2.0, False)] * 2
    assert torch.equal(net(pixels), before)
    assert not torch.equal(twin(pixels), before)


BAD_ROWS = {
    "nan": (math.nan, "hold NaN or infinite values"),
    "inf": (math.inf, "hold NaN or infinite values"),
    "minus-inf": (-math.inf, "hold NaN or infinite values"),
    "zero": (0.0, "are all zero"),
    "negative-zero": (-0.0, "are all zero"),
}


@pytest.mark.parametrize(("value", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_latents_that_cannot_be_binarized(net, value, message):
    """The layer, how many rows, and the first of them."""
    name = "head.1" if value == math.inf else "patches"
    layer = net.get_submodule(name)
    layer.check_latent(name)
    with torch.no_grad():
        layer.weight[1:] = value
    rows = len(layer.weight)
    with pytest.raises(LatentError) as caught:
        layer.check_latent(name)
    assert f"{name}.weight: {rows - 1} of {rows} rows {message} (first: row 1)" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_value_is_enough(net, value):
    with torch.no_grad():
        net.patches.weight[3, 2, 1, 0] = value
    with pytest.raises(LatentError, match=r"here.weight: 1 of 5 rows .*first: row 3"):
        net.patches.check_latent("here")


def test_a_zero_row_comes_with_what_to_do(net):
    with torch.no_grad():
        net.patches.weight[4] = 0
        net.patches.weight[2] = 0
        net.patches.weight[2, 0, 0, 0] = 1e-30
    with pytest.raises(LatentError, match=re.escape("modules_to_not_convert=['vit.patches']")) as caught:
        net.patches.check_latent("vit.patches")
    assert "1 of 5 rows are all zero (first: row 4)" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_weights_leave_nothing_once_their_mean_is_gone(dtype):
    """0.1 is not exact: what is left of it is rounding. Restored, the row is its mean; not centred, it has signs."""
    for center in ("none", "remove", "restore"):
        layer = BinaryLinear(7, 3, pair=get_pair("bc"), center=center, dtype=dtype)
        with torch.no_grad():
            layer.weight[1] = 0.1
        if center == "remove":
            with pytest.raises(LatentError, match=r"here.weight: the weights of row 1 are all equal.*center='restore'"):
                layer.check_latent("here")
        else:
            layer.check_latent("here")


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_evaluating_puts_each_module_back_to_its_own_mode(fails):
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1].eval()
    before = [module.training for module in model.modules()]
    assert before == [True, True, False, False, False]
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert [module.training for module in model.modules()] == before
