"""What a person should put right: problems that a running daemon reports, errors that end a command."""

from typing import NamedTuple


class Problem(NamedTuple):
    """Something that is in the way of the daemon, or that it must not change."""

    code: str  # a fixed word, for programs
    text: str  # what is wrong, where, and how to put it right


class CommandError(Exception):
    """A command cannot do its work; the text says why and what to do."""

    exit_code = 1
