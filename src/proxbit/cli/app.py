"""The program `proxbit`, for whoever has imported the package already: see `proxbit_cli`."""

from proxbit_cli import app, main

__all__ = ["app", "main"]
