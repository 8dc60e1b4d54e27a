"""The one place where errors end a command."""

import errno

import click
import pytest
from click.testing import CliRunner, Result

from framepack_core.errors import ModelError
from framepackd.cli.options import Commands
from framepackd.jobs.lock import AlreadyRunningError
from framepackd.settings.config import ConfigError


def ended_on(error: BaseException) -> Result:
    """Run a command that raises an error."""
    commands = Commands("framepackd")

    @commands.command()
    def fail() -> None:
        raise error

    return CliRunner().invoke(commands, ["fail"])


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("steps must be 1 to 100, got 0"), 2, "steps must be 1 to 100, got 0"),
        (AlreadyRunningError("a daemon runs"), 75, "a daemon runs"),
        (ModelError("vae.safetensors is missing"), 1, "vae.safetensors is missing"),
        (OSError("127.0.0.1:80 cannot be listened on"), 1, "127.0.0.1:80 cannot be listened on"),
        (
            OSError(errno.EROFS, "Read-only file system", "/s"),
            1,
            "/s: Read-only file system: check that the disk is fine and this user may read and write there",
        ),
    ],
)
def test_an_error_that_a_person_can_put_right_is_one_line_with_its_exit_code(
    error: Exception, code: int, text: str
) -> None:
    ended = ended_on(error)
    assert (ended.exit_code, ended.stderr, ended.stdout) == (code, f"framepackd: {text}\n", "")


def test_an_error_of_our_own_keeps_its_traceback() -> None:
    assert isinstance(ended_on(KeyError("model")).exception, KeyError)


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), click.UsageError("no job")])
def test_what_click_handles_is_left_to_it(error: Exception) -> None:
    ended = ended_on(error)
    assert "framepackd: " not in ended.stderr
    assert ended.exit_code == (1 if isinstance(error, OSError) else 2)
