"""The commands of the program `proxbit`, one file a command; `proxbit_cli` names them."""

from proxbit.cli.app import main

__all__ = ["main"]
