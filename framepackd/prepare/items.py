"""The items that ``prepare`` works on: where they come from, their names, and what became of them."""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath

from framepack_core.media.pictures import Picture
from framepackd.inbox.naming import MAX_NAME, group_files
from framepackd.text import as_utf8

LONGEST_ENDING = len("_first_frame.png")


class UsageError(Exception):
    """The command cannot be carried out; the text says why and what to do."""


class ItemOutcome(StrEnum):
    """The outcomes of preparing an item."""

    PREPARED = "prepared"
    THERE = "there already"
    DONE = "done or queued already"
    DIFFERENT = "too different"
    BAD = "bad"


@dataclass(frozen=True)
class Options:
    """The options of the command; see ``framepackd prepare --help``."""

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

    origin: str  # how messages name it
    folder: str  # below the target
    name: str
    endings: tuple[str, ...]  # what follows ``name`` in the names of its pictures
    pictures: Callable[[], Iterator[Picture]]
    text: Callable[[], str]
    differences: tuple[float, ...] | None = None  # of neighbouring pictures, if they are recorded


@dataclass(frozen=True)
class ItemResult:
    """The outcome for an item, and how much its pictures differ, if that was measured."""

    item: Item
    outcome: ItemOutcome
    error: str | None = None
    differences: tuple[float, ...] = ()


@dataclass
class ItemStream:
    """The items, one after the other, and how many there are."""

    total: int
    endings: tuple[str, ...]
    items: Iterable[Item] = field(repr=False)


def endings_of(count: int, *, chain: bool) -> tuple[str, ...]:
    """Say what follows NAME in the names of its pictures.

    >>> endings_of(2, chain=False)
    ('_first_frame.png', '_last_frame.png')
    >>> endings_of(2, chain=True)
    ('_frame_0.png', '_frame_1.png')
    """
    if chain:
        return tuple(f"_frame_{number}.png" for number in range(count))
    return ("_first_frame.png", "_last_frame.png") if count == 2 else (".png",)


def choose_names(paths: list[PurePosixPath]) -> dict[PurePosixPath, str]:
    """Choose a NAME for each file: its stem, or one like it if that cannot be used.

    The same files always get the same names, whatever is in the target. Files whose names would be the same,
    as clip.mp4 and clip.mov, get their types appended.

    >>> list(choose_names([PurePosixPath("a/clip.mp4"), PurePosixPath("a/clip.mov")]).values())
    ['clip_mp4', 'clip_mov']
    """
    names = {path: safe_name(path.stem) for path in paths}
    others: tuple[Callable[[PurePosixPath], str], ...] = (
        lambda path: f"{path.stem}_{path.suffix[1:]}",
        lambda path: f"{path.stem}_{_hash(path.name)}",
    )
    for other in others:
        taken = Counter((path.parent, name.casefold()) for path, name in names.items())
        names = {
            path: safe_name(other(path)) if taken[path.parent, name.casefold()] > 1 else name
            for path, name in names.items()
        }
    return names


def safe_name(stem: str) -> str:
    """Give a NAME that is not too long, and that the inbox does not take for a companion of another file.

    >>> safe_name("clip"), safe_name("clip_end")
    ('clip', 'clip_end_video')
    """
    name = unicodedata.normalize("NFC", as_utf8(stem))
    if len(name.encode()) > MAX_NAME - LONGEST_ENDING - len("_video"):
        start = name.encode()[: MAX_NAME // 2].decode(errors="ignore")
        name = f"{start}_{_hash(stem)}"
    return name if _stands_alone(name) else f"{name}_video"


def _hash(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:8]


def _stands_alone(name: str) -> bool:
    for suffix in (".png", ".txt", ".toml"):
        groups = group_files([name + suffix])
        if [group.name for group in groups] != [name]:
            return False
    return True
