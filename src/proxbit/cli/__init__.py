"""The command line: `proxbit`, one file a command."""

from proxbit.cli.app import main

__all__ = ["main"]
