"""`proxbit unpack`: a float model for people without the plug-in."""

from pathlib import Path
from typing import Annotated

import typer

from proxbit.cli.checkpoints import check_new_folder, load_model, load_processor, save
from proxbit.errors import ModelStateError
from proxbit.patching import beyond_float
from proxbit.plugin import dequantize

__all__ = ["unpack"]


def unpack(
    model: Annotated[str, typer.Argument(help="A packed or latent checkpoint: a folder, or a name on the hub.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the float one.")],
) -> None:
    """Make a packed model float, for people without proxbit.

    The layers hold plus and minus their scales: outputs stay the same, but for the rounding of int8 and int4
    activations, and the file is as large as a float one. Activations of two levels, narrow accumulators and RPReLU are
    what no float model of transformers has: such a model is refused.

    Example: proxbit unpack vit-1bit vit-float
    """
    check_new_folder(out)
    loaded = load_model(model)
    if left_out := beyond_float(loaded):
        raise ModelStateError(
            f"{model} has {', '.join(left_out)}: no float model computes the same. Those who use it need proxbit."
        )
    save(dequantize(loaded), load_processor(model), out)
