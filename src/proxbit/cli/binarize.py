"""`proxbit binarize`: from a float model to a latent checkpoint."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from proxbit.cli.checkpoints import check_new_folder, load_model, load_processor, save
from proxbit.config import BinarizationConfig
from proxbit.errors import ConfigError
from proxbit.hub import binarize as binarize_model
from proxbit.training.recipes import DEFAULT_RECIPE, get_recipe

__all__ = ["binarize"]

HELP = {item.name: item.metadata["help"] for item in fields(BinarizationConfig)}


def _option(name: str, metavar: str | None = None) -> Any:
    """An option with the help of the field of the configuration that it sets."""
    flag = f"--{name.replace('_', '-')}"
    return typer.Option(flag, help=escape(HELP[name]), metavar=metavar, show_default=False)


def _object(name: str, text: str | None) -> dict[str, Any] | None:
    """A JSON object from the command line."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--{name.replace('_', '-')} must be JSON, not {text!r}: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"--{name.replace('_', '-')} must be a JSON object, not {text}.")
    return value


def binarize(
    model: Annotated[str, typer.Argument(help="A float model: a folder, or a name on the hub.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the latent checkpoint.")],
    recipe: Annotated[
        str,
        typer.Option(metavar="NAME", help="See `proxbit recipes`. Options below take the place of its fields."),
    ] = DEFAULT_RECIPE,
    weights: Annotated[str | None, _option("weights", "NAME")] = None,
    pair_parameters: Annotated[str | None, _option("pair_parameters", "JSON")] = None,
    activations: Annotated[str | None, _option("activations", "NAME")] = None,
    activation_pair: Annotated[str | None, _option("activation_pair", "NAME")] = None,
    rprelu: Annotated[bool, _option("rprelu")] = False,
    residual: Annotated[bool, _option("residual")] = False,
    accumulator_bits: Annotated[int | None, _option("accumulator_bits", "N")] = None,
    accumulator_mode: Annotated[str | None, _option("accumulator_mode", "NAME")] = None,
    overrides: Annotated[str | None, _option("overrides", "JSON")] = None,
    learned_attention: Annotated[list[str] | None, _option("learned_attention", "PATTERN")] = None,
    include: Annotated[list[str] | None, _option("include", "PATTERN")] = None,
    modules_to_not_convert: Annotated[list[str] | None, _option("modules_to_not_convert", "PATTERN")] = None,
    normalize: Annotated[str | None, _option("normalize", "NAME")] = None,
    scale: Annotated[str | None, _option("scale", "NAME")] = None,
    center: Annotated[str | None, _option("center", "NAME")] = None,
) -> None:
    """Make a float model latent: ready to be trained.

    It is as large as before, and simulated; `proxbit train` trains it, `proxbit pack` packs it. Objects are given as
    JSON, lists by repeating the option.

    Example: proxbit binarize google/vit-base-patch16-224 latent --recipe w1a8 --weights parq
    """
    given = {name: value for name, value in locals().items() if name in HELP and value}
    given |= {name: _object(name, given[name]) for name in ("pair_parameters", "overrides") if name in given}
    config = get_recipe(recipe).binarization(**given)
    check_new_folder(out)
    save(binarize_model(load_model(model), config), load_processor(model), out)
