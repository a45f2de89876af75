"""The registry of pairs: names, and the parameters that some of them take."""

import copyreg
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from proxbit.errors import ConfigError, UnknownNameError
from proxbit.quantizers.pairs import QuantizerPair
from proxbit.registry import Registry

__all__ = ["PAIRS", "get_pair", "pair_key", "register_pair"]

PAIRS: Registry[QuantizerPair] = Registry("quantizer pair")
_FACTORIES: dict[str, Callable[..., QuantizerPair]] = {}
_MADE: dict[tuple[str, str], QuantizerPair] = {}
_MAKE_ONE = "Functions of (w, mu) become a pair with compose(P, T) or heuristic(F, B); register what that returns."


def register_pair(name: str, pair: QuantizerPair | Callable[..., QuantizerPair]) -> QuantizerPair:
    """Make a pair available by name wherever a pair is accepted.

    Args:
        name: a new name.
        pair: from `compose` or `heuristic`; or a function of keyword parameters, each with a default and of a JSON
            type, that returns one: then `get_pair(name, parameters)` makes variants of it, and a configuration file
            stores the parameters with the name.

    Returns:
        The pair; of a function, the one of its default parameters.

    Raises:
        UnknownNameError: if the name is taken.
        ConfigError: if it is neither a pair nor a function that returns one.
    """
    if isinstance(pair, QuantizerPair):
        return PAIRS.register(name, pair)
    if not callable(pair):
        raise ConfigError(
            f"register_pair({name!r}, ...) takes a QuantizerPair, or a function that returns one; not {pair!r}."
        )
    try:
        inspect.signature(pair).bind()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"register_pair({name!r}, ...) takes a function whose parameters all have defaults, and that returns a "
            f"QuantizerPair; not {pair!r}: {error}. {_MAKE_ONE}"
        ) from error
    registered = PAIRS.register(name, _made(name, pair, {}))
    _FACTORIES[name] = pair
    return registered


def _made(name: str, factory: Callable[..., QuantizerPair], parameters: Mapping[str, Any]) -> QuantizerPair:
    try:
        inspect.signature(factory).bind(**parameters)
    except TypeError as error:
        raise ConfigError(
            f"The quantizer pair {name!r} cannot take the parameters {dict(parameters)}: {error}. "
            f"Its signature: {name}{inspect.signature(factory)}."
        ) from error
    pair = factory(**parameters)
    if not isinstance(pair, QuantizerPair):
        raise ConfigError(
            f"The function of the quantizer pair {name!r} returned {pair!r}, not a QuantizerPair. {_MAKE_ONE}"
        )
    return pair


def get_pair(pair: str | QuantizerPair, parameters: Mapping[str, Any] | None = None) -> QuantizerPair:
    """The pair of that name and parameters; a pair is returned as it is.

    Args:
        pair: a name, or a pair.
        parameters: of the function registered under the name, as JSON types. The same ones give the same object.

    Raises:
        UnknownNameError: if no pair has that name; the message lists the valid ones.
        ConfigError: for parameters that the pair does not take, or cannot work with.
    """
    if isinstance(pair, QuantizerPair):
        if parameters:
            raise ConfigError("Parameters go with the name of a pair; this QuantizerPair has its own already.")
        return pair
    plain = PAIRS.get(pair)
    if not parameters:
        return plain
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"Parameters go by name, such as {{'levels': [-1, 1]}}; not {parameters!r}.")
    if pair not in _FACTORIES:
        raise ConfigError(f"The quantizer pair {pair!r} takes no parameters; it was given {dict(parameters)}.")
    try:
        key = (pair, json.dumps(parameters, sort_keys=True, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"The parameters of a quantizer pair must be JSON types, not {dict(parameters)}: {error}."
        ) from error
    if key not in _MADE:
        _MADE.setdefault(key, _made(pair, _FACTORIES[pair], parameters))
    return _MADE[key]


def pair_key(pair: str | QuantizerPair) -> tuple[str, dict[str, Any]]:
    """The registered name and parameters of a pair, which are what a configuration file stores.

    Raises:
        UnknownNameError: if the name, or the object, is not registered.
    """
    if not isinstance(pair, QuantizerPair):
        PAIRS.get(pair)
        return pair, {}
    for name in PAIRS:
        if PAIRS.get(name) is pair:
            return name, {}
    for (name, parameters), made in _MADE.items():
        if made is pair:
            return name, json.loads(parameters)
    raise UnknownNameError(
        "This QuantizerPair has no name, so no checkpoint could say which pair it was trained with. "
        "Call proxbit.register_pair('a-name', pair) first."
    )


def _reduced(pair: QuantizerPair) -> Any:
    """A pair with a name is pickled by it, as in the processes that train: the same object comes back, which kernels
    and configurations know it by.
    """
    try:
        name, parameters = pair_key(pair)
    except UnknownNameError:
        return object.__reduce_ex__(pair, 2)
    return get_pair, (name, parameters)


copyreg.pickle(QuantizerPair, _reduced)
