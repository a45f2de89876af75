"""`proxbit pack`: from a latent checkpoint to a packed one."""

from pathlib import Path
from typing import Annotated

import typer

from proxbit.cli.checkpoints import check_new_folder, load_model, load_processor, save
from proxbit.plugin import pack as pack_model

__all__ = ["pack"]


def pack(
    model: Annotated[str, typer.Argument(help="A latent checkpoint: a folder, or a name on the hub.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the packed one.")],
) -> None:
    """Make a latent model packed: one bit a weight.

    Example: proxbit pack runs/vit/latent vit-1bit
    """
    check_new_folder(out)
    save(pack_model(load_model(model)), load_processor(model), out)
