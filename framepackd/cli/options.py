"""What all commands share: the option for the configuration, and the one place where errors end them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from framepack_core.errors import FramePackError
from framepackd.problems import CommandError

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


class Commands(click.Group):
    """Ends a command on an error that a person can put right: with its text on stderr and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except CommandError as error:
            fail(str(error), error.exit_code)
        except FramePackError as error:
            fail(str(error), 1)
        except BrokenPipeError:  # the reader of our output has ended: click handles that
            raise
        except OSError as error:
            if error.strerror is None:  # one of ours, whose text says all
                fail(str(error), 1)
            where = error.filename or getattr(ctx.obj, "state_dir", "")  # a sync that failed names no file
            remedy = "check that the disk is fine and this user may read and write there"
            fail(f"{where}: {error.strerror}: {remedy}", 1)


def load(path: Path | None) -> "Config":
    """Read the configuration of a command.

    Raises:
        ConfigError: it holds a mistake.
    """
    from framepackd.settings.config import load_config

    config = load_config(path)
    click.get_current_context().find_root().obj = config
    return config


def fail(message: str, code: int) -> NoReturn:
    """Say on stderr what is wrong, and end."""
    click.echo(f"framepackd: {message}", err=True)
    sys.exit(code)
