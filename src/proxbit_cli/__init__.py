"""The program `proxbit`: its commands, and how it ends when one of them refuses.

It lies beside the package `proxbit`, whose import takes torch and transformers with it: `proxbit --help` needs neither.
A command is the function of its name in the module `proxbit.cli.<name>`, which is imported when the command is used.
"""

import sys
import warnings
from importlib import import_module
from inspect import getdoc
from typing import Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from typer.core import TyperGroup
except ModuleNotFoundError as error:
    sys.exit(f"Error: proxbit on the command line needs {error.name}: pip install 'proxbit[cli]'.")

__all__ = ["COMMANDS", "LazyGroup", "app", "main"]

# One line a command: its name, and the first line of its help.
COMMANDS = {
    "bench": "Time a model, float and packed, and show where its time goes.",
    "binarize": "Make a float model 1-bit from images, or latent for training.",
    "card": "Show the quantization card of a model, or compare two.",
    "demo": "Make a small model 1-bit, and classify images with it.",
    "env": "Show versions, the processor, and which kernels run.",
    "evaluate": "Measure accuracy, latency and throughput on images.",
    "pack": "Make a latent model packed: one bit a weight.",
    "pairs": "List the quantizer pairs: F, B, sound or not and why, source.",
    "plot": "Draw F, B, P, T and the regularizer of a quantizer pair.",
    "push": "Upload a packed model to the Hub, with its cards.",
    "recipes": "List the recipes: what each makes, and what it sets.",
    "report": "Write a page about a training run.",
    "summary": "Show what a model is made of: states, bits, bytes, kernels.",
    "train": "Train a 1-bit classifier on images, evaluate, pack and save it.",
    "unpack": "Make a packed model float, for people without proxbit.",
}
# `train` takes the fields of its dataclasses as options, and reads them itself.
READ_THEMSELVES = {"train": {"ignore_unknown_options": True, "allow_extra_args": True}}
SETTINGS: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": "rich"}


class LazyGroup(TyperGroup):
    """Commands that are known by name and help; the one that is called is imported."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the command that is called, as it really is."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is None:
            return name, command, rest
        alone = typer.Typer(**SETTINGS)
        load = import_module("proxbit.extras").import_with_extras
        function = getattr(load(f"proxbit.cli.{name}", f"proxbit {name}"), name)
        import_module("proxbit.cli.terminal").guard_terminal()
        paragraphs = (escape(" ".join(each.split())) for each in (getdoc(function) or "").split("\n\n"))
        alone.command(name, help="\n\n".join(paragraphs), context_settings=READ_THEMSELVES.get(name))(function)
        return name, typer.main.get_command(alone), rest


def _stand_in() -> None:
    """What the group holds in the place of a command that nobody has called."""


app = typer.Typer(
    name="proxbit",
    help="1-bit vision transformers with ProxConnect++.",
    no_args_is_help=True,
    cls=LazyGroup,
    **SETTINGS,
)
for _name, _help in COMMANDS.items():
    app.command(_name, help=_help)(_stand_in)


def main() -> None:
    """Run the program. What proxbit or the file system refuses is one line on standard error, and exit status 2."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            app()
    except Exception as error:
        no_place = isinstance(error, OSError) and error.errno is not None  # Such as a full disk.
        if not no_place and not isinstance(error, import_module("proxbit.errors").ProxbitError):
            raise
        _tell("[bold red]Error:[/]", " ".join([str(error), *vars(error).get("__notes__", ())]))
        sys.exit(2)


def _warn(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Show a warning in one line, without the line of code that it came from; not those for programmers."""
    if not issubclass(category, DeprecationWarning):
        _tell("[yellow]Warning:[/]", str(message))


def _tell(title: str, text: str) -> None:
    line = import_module("proxbit.foreign").printable(text, most=5000)
    Console(stderr=True, soft_wrap=True).print(f"{title} {escape(line)}", highlight=False)
