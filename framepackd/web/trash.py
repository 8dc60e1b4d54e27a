"""Moves results that nobody wants to a folder beside the outbox: nothing is ever deleted."""

import itertools
from pathlib import Path

from framepackd import files, moving
from framepackd.settings.config import Config
from framepackd.web.gallery import Shown


def move_to_trash(config: Config, shown: Shown) -> Path:
    """Move a result with all that belongs to it; gives the folder that it is in now.

    Raises:
        OSError: it cannot be moved; what was moved is put back.
    """
    source = config.outbox / shown.folder
    stem = shown.result.path.rpartition("/")[2]
    inputs = {Path(path).name for path in shown.result.inputs}
    names = [path.name for path in source.iterdir() if path.name in inputs or _belongs(path.name, stem)]
    target = _free(config.trash / shown.folder, stem)
    files.make_folder(target)
    moved: list[str] = []
    try:
        for number, name in enumerate(sorted(names)):  # a service sees each folder as a disk of its own
            moving.move(source / name, target / name, part=f"trash-{shown.id}-{number}")
            moved.append(name)
    except OSError:
        for number, name in enumerate(moved):
            moving.move(target / name, source / name, part=f"trash-{shown.id}-{number}")
        raise
    return target


def _belongs(name: str, stem: str) -> bool:
    """Say whether a file is of a result: its video, its record, its stills."""
    return name in (f"{stem}.mp4", f"{stem}.json") or name.startswith((f"{stem}.section-", f"{stem}.source."))


def _free(folder: Path, stem: str) -> Path:
    names = itertools.chain([stem], (f"{stem}_{number:03d}" for number in itertools.count(1)))
    return next(folder / name for name in names if not (folder / name).exists())
