"""Sets checkpoints aside that no work can use: kept beside their folder until the job has ended.

``checkpoint.aside-1`` is beside ``checkpoint``; of a chain, ``clip-0002.aside-1`` beside ``clip-0002``.
A folder is moved there with one rename, so that a crash leaves it whole in one of the two places. What fits
again is taken up again, unless ``framepackd retry --anew`` gave it up: the file ``given-up`` in it says so.
"""

from collections.abc import Iterable
from pathlib import Path

from framepackd import files

_MARK = ".aside-"
_GIVEN_UP = "given-up"


def places(folder: Path) -> list[Path]:
    """List what was set aside of a checkpoint's folder, the oldest first."""
    prefix = f"{folder.name}{_MARK}"
    found = (path for path in folder.parent.glob("*") if path.name.startswith(prefix) and path.is_dir())
    return sorted((path for path in found if _number(path)), key=_number)


def of_job(work: Path, checkpoint: str) -> list[Path]:
    """List what was set aside of a job, in its work folder; of a chain's clips too."""
    own = work / checkpoint
    clips = {path.with_name(path.name.partition(_MARK)[0]) for path in own.glob("*") if path.is_dir()}
    return [place for folder in (own, *sorted(clips)) for place in places(folder)]


def next_place(folder: Path) -> Path:
    """Say where the next thing that is set aside of a folder goes."""
    last = max(map(_number, places(folder)), default=0)
    return folder.with_name(f"{folder.name}{_MARK}{last + 1}")


def move(folder: Path, place: Path) -> None:
    """Move a checkpoint's whole folder to or from where it is set aside; durable when it returns.

    Raises:
        OSError: it cannot be moved; it is where it was.
    """
    folder.rename(place)
    files.sync_folder(place.parent)


def move_files(folder: Path, names: Iterable[str], place: Path) -> None:
    """Move single files of a checkpoint, as far as they are there.

    Raises:
        OSError: one cannot be moved; it is where it was.
    """
    files.make_folder(place)
    for name in names:
        if (folder / name).exists():
            (folder / name).rename(place / name)
    files.sync_folder(place)
    files.sync_folder(folder)


def give_up(folder: Path) -> Path | None:
    """Set a checkpoint's folder aside for good, with what was set aside before; says where it is now.

    Raises:
        OSError: it cannot be moved; what is not given up yet is where it was.
    """
    place = next_place(folder) if folder.exists() else None
    for path in (*places(folder), *([folder] if place else [])):
        (path / _GIVEN_UP).touch()
        files.sync_folder(path)
    if place:
        move(folder, place)
    return place


def is_given_up(place: Path) -> bool:
    """Say whether what was set aside is never to be taken up."""
    return (place / _GIVEN_UP).exists()


def _number(place: Path) -> int:
    """Give the number in the name of a place; 0 if it has none."""
    number = place.name.rpartition(_MARK)[2]
    return int(number) if number.isdecimal() else 0
