"""Moves results that nobody wants to a folder beside the outbox: nothing is ever deleted."""

import itertools
import secrets
from pathlib import Path

from framepackd import files
from framepackd.files import moving
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
    return put_away(config, [source / name for name in names], shown.folder, stem)


def put_away(config: Config, paths: list[Path], folder: str, stem: str) -> Path:
    """Move files that lie in one folder to a new one of the trash, all or none; gives that folder.

    Raises:
        OSError: they cannot be moved; what was moved is put back.
    """
    target = _free(config.trash / folder, stem)
    files.make_folder(target)
    moved: list[Path] = []
    part = f"trash-{secrets.token_hex(4)}"
    try:
        for path in sorted(paths):  # a service sees each folder as a disk of its own
            moving.move(path, target / path.name, part=part)
            moved.append(path)
    except OSError:
        for path in moved:
            moving.move(target / path.name, path, part=part)
        raise
    return target


def _belongs(name: str, stem: str) -> bool:
    """Say whether a file is of a result: its video, its record, its stills."""
    whole = {f"{stem}{rest}" for rest in (".mp4", ".json", ".draft.json")}
    return name in whole or name.startswith((f"{stem}.section-", f"{stem}.source."))


def _free(folder: Path, stem: str) -> Path:
    names = itertools.chain([stem], (f"{stem}_{number:03d}" for number in itertools.count(1)))
    return next(folder / name for name in names if not (folder / name).exists())
