"""The command line."""

from framepackd.cli.main import main

__all__ = ["main"]
