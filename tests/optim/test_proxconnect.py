"""The optimizer view: the same iterates as the layers, its state, and its refusals."""

import copy
import itertools

import pytest
import torch
from torch import nn

from proxbit.errors import ConfigError, LatentError, MuRangeError, UnknownNameError
from proxbit.nn import BinaryLinear, latent_layers, set_mu, start_update
from proxbit.optim import ProxConnect
from proxbit.quantizers import PAIRS, MuSchedule, get_pair
from wrapped_network import OPTIMIZERS, backward, groups, network, wrapped

STEPS = 30


@pytest.fixture(scope="module")
def data(crops):
    pixels = crops(12, 3).flatten(1).double()
    return pixels, torch.arange(12) % 3


def as_layers(pair):
    layers = network()
    for place in (0, 2):
        layers[place] = BinaryLinear.from_float(layers[place], pair, pair.units)
    return layers


@pytest.mark.parametrize(("name", "optimizer"), list(zip(sorted(PAIRS), itertools.cycle(OPTIMIZERS))))
def test_the_same_iterates_as_the_layers(name, optimizer, data):
    """Soft along the default schedule, then hard; the latents, the biases and the weights that the forward sees."""
    pair = get_pair(name)
    schedule = MuSchedule(*pair.schedule, steps=STEPS, hard_fraction=0.2)
    plain, layers = network(), as_layers(pair)
    ours = wrapped(plain, name, optimizer, schedule=schedule)
    base = OPTIMIZERS[optimizer](groups(layers))
    for step in range(STEPS):
        set_mu(layers, schedule.mu(step), hard=schedule.is_hard(step))
        seen = [layer.effective_weight().detach().clone() for _, layer in latent_layers(layers)]
        for dual, weight in zip(ours.duals, seen, strict=True):
            torch.testing.assert_close(dual.parameter.data, weight, rtol=0, atol=1e-12)
        assert backward(plain, data) == pytest.approx(backward(layers, data), abs=1e-12)
        ours.step()
        start_update(layers)
        base.step()
        for dual, (_, layer) in zip(ours.duals, latent_layers(layers), strict=True):
            torch.testing.assert_close(dual.latent, layer.weight.data, rtol=0, atol=1e-12)
        torch.testing.assert_close(plain[0].bias, layers[0].bias, rtol=0, atol=1e-12)
    assert ours.is_hard


@pytest.mark.parametrize(
    ("name", "optimizer"), list(zip(["bnn++", "pc", "proxquant", "rpc"], itertools.cycle(OPTIMIZERS)))
)
def test_weights_without_a_gradient_as_in_the_layers(name, optimizer, data):
    """Every other step one weight has none: neither P, nor momentum, nor weight decay moves its latent."""
    pair = get_pair(name)
    schedule = MuSchedule(*pair.schedule, steps=8)
    plain, layers = network(), as_layers(pair)
    ours, base = wrapped(plain, name, optimizer, schedule=schedule), OPTIMIZERS[optimizer](groups(layers))
    for step in range(8):
        set_mu(layers, schedule.mu(step))
        before = ours.duals[0].latent.clone()
        for model in (plain, layers):
            backward(model, data)
            if step % 2:
                model[0].weight.grad = None
        ours.step()
        start_update(layers)
        base.step()
        assert torch.equal(ours.duals[0].latent, before) == bool(step % 2)
        for dual, (_, layer) in zip(ours.duals, latent_layers(layers), strict=True):
            torch.testing.assert_close(dual.latent, layer.weight.data, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["bnn++", "proxquant"])
def test_frozen_weights_stay(name, data):
    """Also with a gradient from before, which the base optimizer would go on with."""
    model = network()
    optimizer = wrapped(model, name, schedule=MuSchedule("constant", 0.3, 0.3, 9))
    frozen, moving = (dual.latent.clone() for dual in optimizer.duals)
    weight = model[0].weight.detach().clone()
    backward(model, data)
    model[0].weight.requires_grad_(False)
    optimizer.step()
    assert torch.equal(optimizer.duals[0].latent, frozen)
    assert torch.equal(model[0].weight, weight)
    assert not torch.equal(optimizer.duals[1].latent, moving)


@pytest.mark.parametrize("name", ["bnn++", "proxquant"])
def test_latents_go_where_a_model_is_moved_after_it_was_wrapped(name, data):
    """As with the optimizers of torch, whose states are made where the parameters are at the first step."""
    pair = get_pair(name)
    schedule = MuSchedule(*pair.schedule, steps=6)
    moved, model = network().float(), network().float().double()
    late, ours = (wrapped(each, name, schedule=schedule) for each in (moved, model))
    moved.double()
    for _ in range(6):
        backward(moved, data)
        backward(model, data)
        late.step()
        ours.step()
    for dual, expected in zip(late.duals, ours.duals, strict=True):
        assert dual.latent.dtype == torch.float64
        # The weights of the first step were of float32.
        torch.testing.assert_close(dual.latent, expected.latent, rtol=0, atol=1e-6)
    state = copy.deepcopy(late.state_dict())
    backward(moved, data)
    late.step()
    late.load_state_dict(state)
    assert all(map(torch.equal, (dual.latent for dual in late.duals), state["proxconnect"]["latents"]))


def test_a_state_is_loaded_as_exact_as_a_model_that_was_moved(data):
    """Before its first step too: the latents of float32, from before the move, are not in between."""
    model = network()
    trained = wrapped(model, "bnn++")
    backward(model, data)
    trained.step()
    moved = network().float()
    resumed = wrapped(moved, "bnn++")
    moved.double()
    state = trained.state_dict()
    resumed.load_state_dict(state)
    assert all(map(torch.equal, (dual.latent for dual in resumed.duals), state["proxconnect"]["latents"]))


class Failing(torch.optim.SGD):
    """Writes into the parameters, then fails."""

    def step(self, closure=None):
        super().step()
        raise RuntimeError("out of memory")


def test_a_base_optimizer_that_fails_leaves_the_quantized_weights(data):
    model = network()
    optimizer = ProxConnect(Failing(groups(model), lr=0.1), "bnn++", [model[0].weight])
    weight, latent = model[0].weight.detach().clone(), optimizer.duals[0].latent.clone()
    backward(model, data)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(optimizer.duals[0].latent, latent)
    assert (optimizer.steps, optimizer.mu) == (0, 1.0)


def test_a_mu_out_of_range_stops_the_step_before_it_changes_anything(data):
    """30 more than 1 is the last: fda takes mu up to 31."""
    model = network()
    optimizer = ProxConnect(torch.optim.SGD(groups(model), lr=20.0), "fda", [model[0].weight, model[2].weight])
    backward(model, data)
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    backward(model, data)
    gradient = model[0].weight.grad.clone()
    with pytest.raises(MuRangeError, match="mu = 41.0 is out of range"):
        optimizer.step()
    assert torch.equal(model[0].weight.grad, gradient)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][key])
    assert optimizer.state_dict()["proxconnect"]["mu"] == before[1]["proxconnect"]["mu"]
    assert torch.equal(optimizer.duals[0].latent, before[1]["proxconnect"]["latents"][0])


def prox(w, mu):
    """sign(w) min(1, |w| + mu), written here."""
    return torch.where(w >= 0, 1.0, -1.0) * (w.abs() + mu).clamp(max=1)


def pull(w, mu):
    """By up to mu towards the nearer of -1 and 1, from both sides."""
    apart = w.abs() - 1
    return torch.where(w >= 0, 1.0, -1.0) * (1 + apart.sign() * (apart.abs() - mu).clamp(min=0))


@pytest.mark.parametrize(
    ("name", "seen", "start"),
    [("pc", prox, lambda w, mu: w), ("proxquant", pull, pull), ("rpc", lambda w, mu: w, pull)],
    ids=["proxconnect", "proxquant", "reverse"],
)
def test_the_three_kinds_of_step(name, seen, start, data):
    """w* <- start(w*) - lr g(seen(w*)), in raw units, with the gradient of a least-squares loss by hand."""
    x = data[0][:, :6]
    y = torch.randn(12, 4, dtype=torch.float64)
    weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64) * 0.5)
    latent, mu, lr = weight.detach().clone(), 0.3, 0.02
    schedule = MuSchedule("constant", mu, mu, 50)
    optimizer = ProxConnect(
        torch.optim.SGD([weight], lr=lr), name, [weight], schedule=schedule, normalize="none", scale="fixed"
    )
    for _ in range(20):
        optimizer.zero_grad()
        ((x @ weight.T - y) ** 2).sum().div(2).backward()
        optimizer.step()
        w = seen(latent, mu)
        latent = start(latent, mu) - lr * (x @ w.T - y).T @ x
        torch.testing.assert_close(optimizer.duals[0].latent, latent, rtol=0, atol=1e-12)


def test_mu_aggregates_the_learning_rates_of_its_group(data):
    """mu = 1 + the sum so far, also while a scheduler moves the learning rate."""
    model = network()
    optimizer = wrapped(model, "md-tanh")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    expected, rate = 1.0, 0.05
    for _ in range(5):
        assert optimizer.mu == pytest.approx(expected, abs=1e-15)
        backward(model, data)
        optimizer.step()
        scheduler.step()
        expected, rate = expected + rate, rate / 2
    scale = model[0].weight.detach() / torch.tanh(expected * optimizer.duals[0].latent / row_mean(optimizer))
    torch.testing.assert_close(scale, scale[:, :1].expand_as(scale), rtol=1e-9, atol=0)


def row_mean(optimizer):
    return optimizer.duals[0].latent.abs().mean(1, keepdim=True)


def test_closure_parameters_without_gradient_and_new_groups(data):
    model = network()
    optimizer = wrapped(model, "bc")
    expected = backward(model, data)
    assert optimizer.step(lambda: backward(model, data)) == expected
    assert isinstance(optimizer, torch.optim.Optimizer)
    latents = [dual.latent.clone() for dual in optimizer.duals]
    for parameter in model.parameters():
        parameter.grad = None
    optimizer.step()
    assert all(torch.equal(dual.latent, latent) for dual, latent in zip(optimizer.duals, latents, strict=True))
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    extra.grad = torch.ones(2)
    optimizer.step()
    assert extra.tolist() == [0.0, 0.0]


def test_refusals():
    model = network()
    base = OPTIMIZERS["sgd"](groups(model))
    with pytest.raises(ConfigError, match=r"Latent weight 0, of shape \[3, 3\], is in no group of the optimizer"):
        ProxConnect(base, "bc", [nn.Parameter(torch.ones(3, 3))])
    with pytest.raises(ConfigError, match=r"of shape \[9\], has no rows"):
        ProxConnect(base, "bc", [model[0].bias])
    with pytest.raises(ConfigError, match=r"Latent weight 1, of shape \[9, 27\], is there twice"):
        ProxConnect(base, "bc", [model[0].weight, model[0].weight])
    with pytest.raises(ConfigError, match="`latents` is empty"):
        ProxConnect(base, "bc", [])
    with pytest.raises(UnknownNameError, match="'bcc'"):
        ProxConnect(base, "bcc", [model[0].weight])
    with pytest.raises(ConfigError, match="normalize must be one of"):
        wrapped(model, normalize="rows")
    with pytest.raises(MuRangeError, match="out of range"):
        wrapped(model, "parq", schedule=MuSchedule("constant", 0.5, 0.5, 3))
    with pytest.raises(MuRangeError, match="mu = 32.0 is out of range"):
        wrapped(model, "fda", schedule=MuSchedule("linear", 9, 32, 3))


@pytest.mark.parametrize("name", ["proxquant", "rpc"])
def test_pairs_that_apply_their_map_anew_need_a_schedule(name):
    model = network()
    words = r"never learns. Pass schedule=MuSchedule\('linear', 0, 0.02, steps\)"
    for schedule in (None, MuSchedule("aggregate", 0, 0, 2, learning_rates=[0.1, 0.1])):
        with pytest.raises(ConfigError, match=words):
            wrapped(model, name, schedule=schedule)
    assert wrapped(model, name, schedule=MuSchedule("linear", 0, 0.02, 2)).mu == 0


def test_what_is_hard_before_harden():
    """Without a schedule mu starts at 1: there "pc" is at its levels, with a weaker pull only once mu is larger."""
    soft = {
        "bc": "bc",
        "pc": "pc",
        "weak pc": get_pair("pc", {"rho": 0.5, "varrho": 0.5}),
        "bnn++": "bnn++",
    }
    changed = {}
    for name, pair in soft.items():
        model = network()
        optimizer = wrapped(model, pair)
        before = model[0].weight.detach().clone()
        assert not optimizer.is_hard
        optimizer.harden()
        changed[name] = not torch.allclose(model[0].weight, before, rtol=1e-12)
    assert changed == {"bc": False, "pc": False, "weak pc": True, "bnn++": True}


@pytest.mark.parametrize(
    ("value", "center", "words"),
    [
        (float("nan"), None, "Latent weight 1: 1 of 3 rows hold NaN or infinite values"),
        (float("-inf"), None, "Latent weight 1: 1 of 3 rows hold NaN or infinite values"),
        (0.0, None, "Latent weight 1: 1 of 3 rows are all zero .*leave it out of `latents` or initialise it"),
        (0.1, "remove", "Latent weight 1: the weights of row 2 are all equal"),
    ],
    ids=["nan", "inf", "zero", "equal"],
)
def test_rows_that_cannot_be_binarized_are_refused_before_anything_is_written(value, center, words):
    model = network()
    with torch.no_grad():
        model[2].weight[2] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LatentError, match=words):
        wrapped(model, center=center)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        (nn.Parameter(torch.ones(0, 3)), r"of shape \[0, 3\], is empty"),
        (nn.Parameter(torch.ones(3, 0)), r"of shape \[3, 0\], is empty"),
        (nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False), "is not floating point"),
        (nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)), "is not floating point"),
    ],
    ids=["no rows", "no columns", "integer", "complex"],
)
def test_tensors_without_real_weights_are_refused(parameter, words):
    with pytest.raises(ConfigError, match=words):
        ProxConnect(torch.optim.SGD([parameter], lr=0.1), "bc", [parameter])
