"""Sets aside checkpoints that the job cannot resume from; they are kept until it has ended.

``checkpoint.aside-1`` lies next to ``checkpoint``; for a clip of a chain ``clip-0002.aside-1`` next to
``clip-0002``. One rename moves a folder, so that a crash leaves it whole in one of the two places. When it
fits again the job resumes from it, unless ``framepackd retry --anew`` left a file ``given-up`` in it.
"""

from collections.abc import Iterable
from pathlib import Path

from framepackd import files

_MARK = ".aside-"
_GIVEN_UP = "given-up"


def places(folder: Path) -> list[Path]:
    """List the folders that were set aside of a checkpoint's folder, the oldest first."""
    prefix = f"{folder.name}{_MARK}"
    found = (path for path in folder.parent.glob("*") if path.name.startswith(prefix) and path.is_dir())
    return sorted((path for path in found if _number(path)), key=_number)


def of_job(work: Path, checkpoint: str) -> list[Path]:
    """List the folders that were set aside in a job's work folder, those of a chain's clips too."""
    own = work / checkpoint
    clips = {path.with_name(path.name.partition(_MARK)[0]) for path in own.glob("*") if path.is_dir()}
    return [place for folder in (own, *sorted(clips)) for place in places(folder)]


def next_place(folder: Path) -> Path:
    """Give the path to which a checkpoint's folder is set aside next."""
    last = max(map(_number, places(folder)), default=0)
    return folder.with_name(f"{folder.name}{_MARK}{last + 1}")


def move(folder: Path, place: Path) -> None:
    """Move a checkpoint's whole folder aside or back; durable when it returns.

    Raises:
        OSError: it cannot be moved; it is where it was.
    """
    folder.rename(place)
    files.sync_folder(place.parent)
    files.tell_moved(folder, place)


def move_files(folder: Path, names: Iterable[str], place: Path) -> None:
    """Move those of some files of a checkpoint that exist.

    Raises:
        OSError: one cannot be moved; it is where it was.
    """
    files.make_folder(place)
    there = [name for name in names if (folder / name).exists()]
    for name in there:
        (folder / name).rename(place / name)
    files.sync_folder(place)
    files.sync_folder(folder)
    for name in there:
        files.tell_moved(folder / name, place / name)


def give_up(folder: Path) -> Path | None:
    """Set a checkpoint's folder aside for good, and mark what was set aside before; gives its new path.

    Raises:
        OSError: it cannot be moved; it is where it was.
    """
    place = next_place(folder) if folder.exists() else None
    for path in (*places(folder), *([folder] if place else [])):
        (path / _GIVEN_UP).touch()
        files.sync_folder(path)
    if place:
        move(folder, place)
    return place


def is_given_up(place: Path) -> bool:
    """Say whether no job may resume from what was set aside."""
    return (place / _GIVEN_UP).exists()


def _number(place: Path) -> int:
    """Give the number at the end of a folder's name; 0 if it has none."""
    number = place.name.rpartition(_MARK)[2]
    return int(number) if number.isdecimal() else 0
