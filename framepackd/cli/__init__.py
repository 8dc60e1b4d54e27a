"""The commands of ``framepackd``: reads their options, calls the wings, prints."""

from framepackd.cli.main import main

__all__ = ["main"]
