"""What a person should put right and what is no job's own: told by ``status``, the metrics and the page."""

from typing import NamedTuple


class Problem(NamedTuple):
    """Something that is in the way of the daemon, or that it must not touch."""

    code: str  # a fixed word, for programs
    text: str  # what is wrong, where, and how to put it right
