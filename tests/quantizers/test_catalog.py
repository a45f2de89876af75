"""The registry of pairs: names, factories with parameters, and what a configuration file stores of them."""

import json
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import proxbit
from pair_formulas import ROWS
from proxbit.errors import ConfigError, UnknownNameError
from proxbit.quantizers import PAIRS, catalog, compose, get_pair, heuristic, pair_key, register_pair
from proxbit.quantizers.functions import CLIP, SIGN, SIGN_SWISH
from proxbit.registry import Registry


@pytest.fixture
def own(monkeypatch):
    """An empty catalog, so that nothing of a test is left in the real one."""
    monkeypatch.setattr(catalog, "PAIRS", Registry("quantizer pair"))
    monkeypatch.setattr(catalog, "_FACTORIES", {})
    monkeypatch.setattr(catalog, "_MADE", {})
    return catalog


def sharp(gain=2.0, levels=(-1.0, 1.0)):
    return compose(lambda w, mu: gain * w, levels=tuple(levels), source=f"gain {gain}")


@pytest.mark.parametrize("name", sorted(ROWS))
def test_names_round_trip(name):
    pair = get_pair(name)
    assert get_pair(pair) is pair is PAIRS.get(name)
    assert get_pair(name, {}) is get_pair(name, None) is pair
    assert pair_key(pair) == pair_key(name) == (name, {})


@pytest.mark.parametrize(("wrong", "meant"), [("bnn+++", "bnn++"), ("binaryrelaxed", "binaryrelax"), ("park", "parq")])
@pytest.mark.parametrize("look_up", [get_pair, pair_key, lambda name: get_pair(name, {"rho": 1.0})])
def test_unknown_pair_names_the_nearest_and_all(look_up, wrong, meant):
    with pytest.raises(UnknownNameError, match=re.escape(f"Unknown quantizer pair {wrong!r}")) as caught:
        look_up(wrong)
    question, valid = str(caught.value).split("? ")
    assert repr(meant) in question
    assert all(name in valid for name in ROWS)


@pytest.mark.parametrize("pair", [get_pair("fda++"), get_pair("pc", {"rho": 0.5})])
def test_a_pair_with_a_name_is_pickled_by_it(pair):
    """Of another object, nothing would say that kernels compute it, nor what it is called."""
    assert pickle.loads(pickle.dumps(pair)) is pair


def test_an_unregistered_pair_has_no_name():
    pair = compose(SIGN, SIGN_SWISH)
    assert get_pair(pair) is pair
    assert pickle.loads(pickle.dumps(pair)) == pair
    with pytest.raises(UnknownNameError, match=r"no name.*proxbit\.register_pair\('a-name', pair\)"):
        pair_key(pair)


def test_registering_a_pair(own):
    pair = heuristic(CLIP, lambda w, mu: w, source="own")
    assert proxbit.register_pair("mine", pair) is pair
    assert get_pair("mine") is pair
    assert pair_key(pair) == ("mine", {})


@pytest.mark.parametrize("second", [compose(SIGN), sharp], ids=["pair", "function"])
def test_a_name_is_given_once(own, second):
    first = register_pair("mine", compose(SIGN))
    with pytest.raises(UnknownNameError, match="'mine' is already registered"):
        register_pair("mine", second)
    assert get_pair("mine") is first
    with pytest.raises(ConfigError, match="takes no parameters"):
        get_pair("mine", {"gain": 3.0})


def test_plain_functions_become_pairs_with_names(own):
    def squashed(w, mu):
        return (mu * w).tanh()

    sound = register_pair("sound", compose(squashed, lambda p, mu: p**3))
    free = register_pair("free", heuristic(squashed, lambda w, mu: w * 0 + 5))
    w = torch.linspace(-2, 2, 9, dtype=torch.float64)
    assert sound.sound and not free.sound
    torch.testing.assert_close(get_pair("sound").backward(w, 0.7), 3 * torch.tanh(0.7 * w) ** 2)
    assert get_pair("free").backward(w, 0.7).tolist() == [5.0] * 9
    assert (pair_key(sound), pair_key(free)) == (("sound", {}), ("free", {}))


def test_parameters_of_a_function(own):
    default = register_pair("sharp", sharp)
    assert get_pair("sharp") is default and default.source == "gain 2.0"
    made = get_pair("sharp", {"gain": 8.0})
    assert made.source == "gain 8.0" and made.levels == (-1.0, 1.0)
    assert made.forward(torch.tensor(0.25), 1.0).item() == 2
    assert get_pair("sharp").forward(torch.tensor(0.25), 1.0).item() == 0.5


def test_the_same_parameters_give_the_same_object(own):
    register_pair("sharp", sharp)
    made = get_pair("sharp", {"gain": 8.0, "levels": (-1, 0, 1)})
    assert get_pair("sharp", {"levels": [-1, 0, 1], "gain": 8.0}) is made
    assert get_pair("sharp", {"levels": [-1, 0, 1], "gain": 9.0}) is not made
    assert get_pair("sharp", {"gain": 8.0}) is not made


def test_threads_that_ask_at_once_get_the_same_object(own):
    def slow(x=1):
        time.sleep(0.05)
        return compose(SIGN, mu_range=(0.0, float(x)))

    register_pair(own, slow)
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: get_pair(own, {"x": 3}), range(4)))
    assert all(pair is made[0] for pair in made)


@pytest.mark.parametrize("parameters", [[1], "x"], ids=str)
def test_parameters_have_names(parameters):
    with pytest.raises(ConfigError, match="Parameters go by name, such as"):
        get_pair("pc", parameters)


def test_name_and_parameters_round_trip_through_a_file(own):
    register_pair("sharp", sharp)
    register_pair("other", lambda gain=1.0: sharp(gain))
    for given in ({"gain": 8.0}, {"gain": 0.1, "levels": [-1, 0, 1]}):
        made = get_pair("sharp", given)
        name, parameters = pair_key(made)
        assert (name, parameters) == ("sharp", given)
        assert get_pair(name, json.loads(json.dumps(parameters))) is made
    assert pair_key(get_pair("other", {"gain": 8.0})) == ("other", {"gain": 8.0})


def test_what_is_given_or_returned_can_be_changed_afterwards(own):
    register_pair("sharp", sharp)
    given = {"levels": [-1, 0, 1]}
    made = get_pair("sharp", given)
    given["levels"].append(2)
    pair_key(made)[1]["levels"].clear()
    assert pair_key(made) == ("sharp", {"levels": [-1, 0, 1]})
    assert made.levels == (-1, 0, 1)


@pytest.mark.parametrize("name", ["pc", "proxquant", "rpc"])
def test_parameters_of_the_family(name):
    made = get_pair(name, {"levels": [-1, 0, 1]})
    assert made.levels == (-1.0, 0.0, 1.0)
    assert get_pair(name, {"levels": [-1, 0, 1]}) is made is not get_pair(name)
    assert pair_key(made) == (name, {"levels": [-1, 0, 1]})


def test_wrong_parameter_names(own):
    register_pair("sharp", sharp)
    with pytest.raises(ConfigError, match="'sharp' cannot take the parameters .*'gian'") as caught:
        get_pair("sharp", {"gian": 3.0})
    assert "sharp(gain=2.0, levels=(-1.0, 1.0))" in str(caught.value)


def test_a_parameter_without_default(own):
    with pytest.raises(ConfigError, match="missing a required argument: 'gain'"):
        register_pair("mine", lambda gain: sharp(gain))
    assert "mine" not in catalog.PAIRS


@pytest.mark.parametrize("name", ["bnn++", "fp", "mine"])
def test_parameters_for_a_pair_without_any(own, name):
    register_pair(name, compose(SIGN))
    with pytest.raises(ConfigError, match=f"{re.escape(repr(name))} takes no parameters; it was given .*'rho': 1.0"):
        get_pair(name, {"rho": 1.0})


@pytest.mark.parametrize(
    "value", [torch.tensor(1.0), {1, 2}, float("nan"), float("inf"), sharp], ids=["tensor", "set", "nan", "inf", "code"]
)
def test_parameters_must_be_json(own, value):
    register_pair("sharp", sharp)
    with pytest.raises(ConfigError, match="must be JSON types, not .*gain"):
        get_pair("sharp", {"gain": value})
    with pytest.raises(ConfigError, match="cannot take the parameters|must be JSON types"):
        get_pair("sharp", {1: 2.0})


@pytest.mark.parametrize("result", [None, 3.0, SIGN], ids=["none", "number", "map"])
def test_a_function_that_returns_no_pair(own, result):
    with pytest.raises(ConfigError, match="The function of the quantizer pair 'mine' returned .*, not a QuantizerPair"):
        register_pair("mine", lambda: result)
    assert "mine" not in catalog.PAIRS
    register_pair("late", lambda wrong=False: result if wrong else compose(SIGN))
    with pytest.raises(ConfigError, match="'late' returned .*, not a QuantizerPair"):
        get_pair("late", {"wrong": True})


@pytest.mark.parametrize(
    "function",
    [lambda w, mu: w, lambda w=1.0, mu=2.0: w * mu, torch.sign, SIGN, SIGN_SWISH.derivative],
    ids=["map", "with defaults", "of torch", "proximal map", "derivative"],
)
def test_a_quantizer_is_no_pair_yet(own, function):
    """The error says how one is made of it."""
    with pytest.raises(ConfigError, match=r"'mine'.*QuantizerPair.*with compose\(P, T\) or heuristic\(F, B\)"):
        register_pair("mine", function)
    assert "mine" not in catalog.PAIRS


@pytest.mark.parametrize("thing", [None, "bnn++", 3])
def test_what_is_no_pair_and_no_function(own, thing):
    with pytest.raises(ConfigError, match=re.escape("register_pair('mine', ...) takes a QuantizerPair, or a function")):
        register_pair("mine", thing)
    assert "mine" not in catalog.PAIRS


def test_parameters_for_a_pair_that_is_one_already():
    with pytest.raises(ConfigError, match="has its own already"):
        get_pair(get_pair("pc"), {"levels": [-1, 0, 1]})
