"""What all commands share: the option ``--config``, the exit codes, and how an error ends a command."""

import logging
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from framepack_core.errors import FramePackError
from framepackd.problems import CommandError
from framepackd.text import PrintableFormatter

if TYPE_CHECKING:
    from framepackd.settings.config import Config

EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Configuration; without it $FRAMEPACKD_CONFIG, the user's, /etc's, or the defaults.",
)


class Commands(click.Group):
    """Lists the commands in groups; ends one on an error with its text on stderr and its exit code."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Begin without commands."""
        super().__init__(*arguments, **named)
        self._sections: dict[str, tuple[click.Command, ...]] = {}

    def add_section(self, heading: str, *commands: click.Command) -> None:
        """Add commands, which the help lists under a heading."""
        self._sections[heading] = commands
        for command in commands:
            self.add_command(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section, each with its whole first sentence."""
        for heading, commands in self._sections.items():
            with formatter.section(heading):
                formatter.write_dl(
                    [(str(command.name), command.get_short_help_str(limit=200)) for command in commands]
                )

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for; Ctrl-C ends it quietly."""
        interrupt = _Interrupt()
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, interrupt)
        try:
            return self._invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(EXIT_INTERRUPTED)
        except (
            Exception
        ):  # an import that is interrupted may end in another error: numpy's in a RecursionError
            if interrupt.came:
                sys.exit(EXIT_INTERRUPTED)
            raise

    def _invoke(self, ctx: click.Context) -> Any:
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


class _Interrupt:
    """Raises KeyboardInterrupt at Ctrl-C, and remembers that it did."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, *_: object) -> NoReturn:
        self.came = True
        raise KeyboardInterrupt


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


def own_command() -> str:
    """Give how this installation's command is typed here: its name where that is found, else its path."""
    found = shutil.which("framepackd")
    here = Path(sys.executable).with_name("framepackd")
    shown = here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here
    return "framepackd" if found and Path(found) == here else str(shown)


def log_to_stderr() -> None:
    """Log with time stamps for people; with priorities instead where systemd's journal reads."""
    form = "%(asctime)s %(levelname)s %(message)s"
    if os.environ.get("JOURNAL_STREAM"):
        priorities = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
        for name, priority in priorities.items():
            logging.addLevelName(getattr(logging, name), f"<{priority}>")
        form = "%(levelname)s%(message)s"
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter(form))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
