"""A problem that a person should put right and that is no job's own."""

from typing import NamedTuple


class Problem(NamedTuple):
    """Something that is in the way of the daemon, or that it must not touch."""

    code: str  # a fixed word, for programs
    text: str  # what is wrong, where, and how to put it right
