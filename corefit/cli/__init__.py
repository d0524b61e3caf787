"""The command line."""

from corefit.cli.commands import cli, main

__all__ = ["cli", "main"]
