"""`proxbit push`: a packed model, to the Hub."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from proxbit.foreign import printable
from proxbit.hub.push import prepare_upload, upload

__all__ = ["push"]

LEFT_SHOWN = 20


def push(
    path: Annotated[Path, typer.Argument(help="The folder of a packed model, as save_pretrained wrote it.")],
    repo: Annotated[str, typer.Argument(help="Where to: owner/name, or a name of yours. It is made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch. By default: main.")] = None,
    token: Annotated[
        str | None, typer.Option(help="A token that may write. By default: HF_TOKEN, or that of `hf auth login`.")
    ] = None,
    latent: Annotated[bool, typer.Option("--latent", help="Upload a latent model, to be trained further.")] = False,
) -> None:
    """Upload a packed model to the Hub, with its cards.

    Weights, configuration, preprocessor and cards go in one commit. Cards that the folder lacks are added to the
    upload; the folder stays as it is, and so does what is no part of the model, which is listed.

    What is on the Hub already is not sent again: an interrupted upload goes on.

    Example: proxbit push vit-base-1bit me/vit-base-1bit --private
    """
    console = Console()
    with prepare_upload(path, repo, revision=revision, token=token, latent=latent) as planned:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(overflow="fold")
        table.add_column(justify="right", no_wrap=True)
        for name, size in planned.files.items():
            table.add_row(escape(printable(name)), decimal(size))
        console.print(table)
        if planned.left:
            more = f", and {len(planned.left) - LEFT_SHOWN} more" if len(planned.left) > LEFT_SHOWN else ""
            names = ", ".join(map(printable, planned.left[:LEFT_SHOWN]))
            console.print(f"stays here: {names}{more}", highlight=False, markup=False, soft_wrap=True)
        what = f"{planned.state}, {len(planned.files)} files, {decimal(planned.bytes)}, to {planned.url}"
        console.print(what, highlight=False, markup=False, soft_wrap=True)
        commit = upload(planned, private=private or None, token=token)
    console.print(f"uploaded: {commit}", highlight=False, markup=False, soft_wrap=True)
