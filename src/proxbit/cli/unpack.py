"""`proxbit unpack`: a float model for people without the plug-in."""

from pathlib import Path
from typing import Annotated

import typer

from proxbit.cli.checkpoints import check_new_folder, load_model, load_processor, save
from proxbit.hub import dequantize

__all__ = ["unpack"]


def unpack(
    model: Annotated[str, typer.Argument(help="A packed or latent checkpoint: a folder, or a name on the hub.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the float one.")],
) -> None:
    """Make a packed model float, for people without proxbit.

    The layers hold plus and minus their scales: outputs stay the same, and the file is as large as a float one.

    Example: proxbit unpack vit-1bit vit-float
    """
    check_new_folder(out)
    save(dequantize(load_model(model)), load_processor(model), out)
