"""Moves results that nobody wants to a folder beside the outbox: nothing is ever deleted."""

import errno
import itertools
from pathlib import Path

from framepackd import files
from framepackd.settings.config import Config
from framepackd.web.gallery import Shown


def trash_of(outbox: Path) -> Path:
    """Give the folder of what was moved out of an outbox."""
    return outbox.with_name(f"{outbox.name}-trash")


def move_to_trash(config: Config, shown: Shown) -> Path:
    """Move a result with all that belongs to it; gives the folder that it is in now.

    Raises:
        OSError: it cannot be moved; what was moved is put back.
    """
    source = config.outbox / shown.folder
    stem = shown.result.path.rpartition("/")[2]
    inputs = {Path(path).name for path in shown.result.inputs}
    names = [path.name for path in source.iterdir() if path.name in inputs or _belongs(path.name, stem)]
    target = _free(trash_of(config.outbox) / shown.folder, stem)
    files.make_folder(target)
    moved: list[str] = []
    try:
        for name in sorted(names):
            (source / name).rename(target / name)
            moved.append(name)
    except OSError as error:
        for name in moved:
            (target / name).rename(source / name)
        if error.errno == errno.EXDEV:
            raise OSError(f"{target} is on another disk than the outbox: move the files by hand") from error
        raise
    files.sync_folder(target)
    files.sync_folder(source)
    return target


def _belongs(name: str, stem: str) -> bool:
    """Say whether a file is of a result: its video, its record, its stills."""
    return name in (f"{stem}.mp4", f"{stem}.json") or name.startswith((f"{stem}.section-", f"{stem}.source."))


def _free(folder: Path, stem: str) -> Path:
    names = itertools.chain([stem], (f"{stem}_{number:03d}" for number in itertools.count(1)))
    return next(folder / name for name in names if not (folder / name).exists())
