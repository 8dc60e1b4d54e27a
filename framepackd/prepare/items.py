"""The item that ``prepare`` works on: where it comes from, and what became of it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from framepack_core.media.pictures import Picture
from framepackd.problems import CommandError

if TYPE_CHECKING:
    pass


class UsageError(CommandError):
    """What was asked for cannot be done; the text says why and what to do."""

    exit_code = 2


class Outcome(StrEnum):
    """What became of an item."""

    PREPARED = "prepared"
    THERE = "there already"
    DONE = "done or queued already"
    DIFFERENT = "too different"
    BAD = "bad"


@dataclass(frozen=True)
class Options:
    """What was asked for; see ``framepackd prepare --help``."""

    source: Path
    target: Path
    frames: int | None = None
    prompt: str | None = None
    max_difference: float | None = None
    settings: str = ""  # TOML
    split: str | None = None
    skip_done: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Item:
    """A video or a row of a data set, and the job it is to become."""

    origin: str  # as people know it
    folder: str  # below the target
    name: str
    endings: tuple[str, ...]  # what its pictures' names add to ``name``
    pictures: Callable[[], Iterator[Picture]]
    text: Callable[[], str]
    differences: tuple[float, ...] | None = None  # recorded ones of neighbouring pictures


@dataclass(frozen=True)
class Result:
    """What became of an item, and how much its pictures differ, as far as that was looked at."""

    item: Item
    outcome: Outcome
    error: str | None = None
    differences: tuple[float, ...] = ()


@dataclass
class Source:
    """All items, as they come, and how many there are."""

    total: int
    endings: tuple[str, ...]
    items: Iterable[Item] = field(repr=False)
