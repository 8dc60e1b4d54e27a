"""What all commands share: the option for the configuration, and how they end on an error."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from framepackd.settings.config import Config

EXIT_USAGE = 2

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Configuration; without it $FRAMEPACKD_CONFIG, the user's, /etc's, or the defaults.",
)


def load(path: Path | None) -> "Config":
    """Read the configuration, or end with what is wrong with it."""
    from framepackd.settings.config import ConfigError, load_config

    try:
        return load_config(path)
    except ConfigError as error:
        fail(str(error), EXIT_USAGE)


def fail(message: str, code: int) -> NoReturn:
    """Say what is wrong, and end."""
    click.echo(f"framepackd: {message}", err=True)
    sys.exit(code)
