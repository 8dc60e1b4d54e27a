"""Chooses names that are free in a folder and that it can hold."""

import contextlib
import errno
import itertools
import os
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from framepackd import files
from framepackd.text import stand_ins

# These do not concern the name. Any other error does, and another name is tried: exFAT by FUSE says ENOENT.
FULL = (errno.ENOSPC, errno.EDQUOT)


def holds(target: Path, job_id: str, name: str) -> bool:
    """Say whether a folder can hold a name, by trying it in a hidden folder there."""
    with _trial(target, job_id) as trial:
        try:
            (trial / name).touch()
        except OSError as error:
            if error.errno in FULL:
                raise
            (trial / "a").touch()
            return False
    return True


@contextlib.contextmanager
def _trial(folder: Path, job_id: str) -> Iterator[Path]:
    """Make a hidden folder for a moment, under a name that any file system can hold.

    Raises:
        OSError: it cannot be made, so no name would do.
    """
    trial = folder / f"{files.PART_PREFIX}{job_id}-names"
    trial.mkdir(exist_ok=True)
    try:
        yield trial
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def make_below(root: Path, folder: str, job_id: str) -> str:
    """Make a folder below a root, which must exist; gives its path, with stand-ins for refused names.

    Raises:
        OSError: it cannot be made.
    """
    root.stat()  # it is never made here: its share may not be mounted
    made = PurePosixPath()
    for part in PurePosixPath(folder).parts:
        made /= _make(root / made, stand_ins(part), job_id)
    return str(made) if folder else ""


def _make(above: Path, names: list[str], job_id: str) -> str:
    """Make a folder under the first name that the file system accepts."""
    for name in names[:-1]:
        try:
            files.make_folder(above / name)
        except OSError as error:
            if error.errno in FULL:
                raise
            with _trial(above, job_id):
                continue
        return name
    files.make_folder(above / names[-1])
    return names[-1]


def free_stem(name: str, rests: list[str], target: Path, after: str | None = None) -> str:
    """Find a name under which none of the files exists yet: NAME, NAME_001, NAME_002 ...

    If the first name is taken the folder is listed, once: it may hold the results of years. Looking a name up
    shows whether the file system ignores case.

    Raises:
        OSError: the folder cannot be read.
    """
    first = 0 if after is None else _number(name, after) + 1
    stems = (f"{name}_{number:03}" if number else name for number in itertools.count(first))
    likely = next(stems)
    if not any(os.path.lexists(target / (likely + rest)) for rest in rests):
        return likely
    with os.scandir(target) as entries:
        listed = {entry.name for entry in entries}
    folded = {_folded(entry) for entry in listed}
    tells_case = True
    for stem in itertools.chain([likely], stems):
        its = [stem + rest for rest in rests]
        clashes = not folded.isdisjoint(map(_folded, its))
        if not listed.isdisjoint(its) or (clashes and not tells_case):
            continue
        if not any(os.path.lexists(target / file) for file in its):
            return stem
        tells_case = tells_case and not clashes
    raise AssertionError("numbers do not end")


def _folded(name: str) -> str:
    """Give a form that is the same for names that some file systems do not distinguish."""
    return unicodedata.normalize("NFC", name).casefold()


def _number(name: str, stem: str) -> int:
    """Give the number that follows a name in a stem: 0 for the name alone, -1 for another name."""
    if stem == name:
        return 0
    number = stem.removeprefix(f"{name}_")
    return int(number) if number != stem and number.isdecimal() else -1
