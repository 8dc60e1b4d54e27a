"""Writes into a job's work folder what a node tells of its files, as durably as a worker here would.

A node may be broken, or lie: its names are those that a worker writes, its sizes are bounded, its parts come
in order and whole, and what a checkpoint names is never overwritten with something else. What is wrong is
refused before anything of it has a name.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from framepackd import files
from framepackd.cluster import names
from framepackd.cluster.names import RefusedError
from framepackd.worker.messages import Clear, Kept, Moved
from framepackd.worker.state_file import DamagedError, named_files

OPEN_FILES = 4  # that arrive in parts at a time: a worker writes from a few threads
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class _Arriving:
    """A file of which not all parts are here."""

    size: int
    durable: bool
    there: int = 0  # bytes


class Mirror:
    """One job's work folder, which a node's worker changes by messages."""

    def __init__(self, folder: Path, largest: int) -> None:
        """Use a work folder, which exists; ``largest``: the bytes that a file of the job may have."""
        self._root = folder
        self._largest = largest
        self._arriving: dict[str, _Arriving] = {}

    def keep(self, kept: Kept) -> None:
        """Write a part of a file; with the last one it has its name and is as durable as the message says.

        Raises:
            RefusedError: no worker sends this.
            OSError: it cannot be written.
        """
        names.check_from_node(kept.name)
        arriving = self._next(kept)
        folder, name = _split(kept.name)
        with self._folder(folder) as place:
            part = files.hidden_part(place / name)
            descriptor = os.open(part, _FLAGS | (0 if kept.offset else os.O_TRUNC), 0o666)
            try:
                os.lseek(descriptor, kept.offset, os.SEEK_SET)
                files.write_all(descriptor, kept.content)
                if arriving.there == arriving.size and kept.durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if arriving.there < arriving.size:
                self._arriving[kept.name] = arriving
                return
            if names.is_checkpoint_file(kept.name):
                _refuse_to_overwrite(place / name, part)
            part.replace(place / name)
            if kept.durable:
                files.sync_folder(place)

    def clear(self, clear: Clear) -> None:
        """Remove a file, if it is there.

        Raises:
            RefusedError: no worker removes this.
            OSError: it cannot be removed.
        """
        names.check_from_node(clear.name)
        folder, name = _split(clear.name)
        with contextlib.suppress(FileNotFoundError), files.folder_below(self._root, folder) as place:
            (place / name).unlink()

    def move(self, moved: Moved) -> None:
        """Rename a file of a checkpoint, or a folder of one; durable when it returns.

        Raises:
            RefusedError: no worker does this, or the new name is taken.
            OSError: it cannot be renamed.
        """
        names.check_move(moved.source, moved.target)
        is_folder = names.is_checkpoint_folder(moved.source)
        (folder, name), (to_folder, to_name) = _split(moved.source), _split(moved.target)
        if is_folder and not os.path.lexists(self._root / moved.source):
            return  # it was empty there, and no file of it was told
        with self._folder(folder) as place, self._folder(to_folder) as to:
            if is_folder and (to / to_name).is_dir():
                _empty_of_parts(to / to_name)
            elif os.path.lexists(to / to_name):
                raise RefusedError(f"it moves {moved.source} to {moved.target}, which exists")
            (place / name).rename(to / to_name)
            for changed in (place, to):
                files.sync_folder(changed)

    def _next(self, kept: Kept) -> _Arriving:
        """Check that a part is the next of its file."""
        end = kept.offset + len(kept.content)
        before = self._arriving.pop(kept.name, _Arriving(kept.size, kept.durable))
        if not 0 <= kept.size <= self._largest:
            raise RefusedError(f"{kept.name} has {kept.size} bytes, of at most {self._largest}")
        if (before.size, before.durable, before.there) != (kept.size, kept.durable, kept.offset):
            raise RefusedError(
                f"{kept.name} goes on at byte {kept.offset} of {kept.size}, not {before.there}"
            )
        if end > kept.size or (not kept.content and kept.size):
            raise RefusedError(f"{kept.name} has a part from byte {kept.offset} to {end} of {kept.size}")
        if len(self._arriving) >= OPEN_FILES:
            raise RefusedError(f"{len(self._arriving)} files are in parts when {kept.name} begins")
        return _Arriving(kept.size, kept.durable, end)

    @contextmanager
    def _folder(self, folder: str) -> Iterator[Path]:
        """Open a folder below the work folder, through no symbolic link; makes what is missing."""
        above = ""
        for part in PurePosixPath(folder).parts:
            with files.folder_below(self._root, above) as place:
                files.make_folder(place / part)
            above = f"{above}/{part}" if above else part
        with files.folder_below(self._root, above) as place:
            yield place


def _split(name: str) -> tuple[str, str]:
    folder, _, own = name.rpartition("/")
    return folder, own


def _refuse_to_overwrite(path: Path, part: Path) -> None:
    """Refuse another content for a file that a state names, and for a state."""
    if not path.exists() or files.sha256(path) == files.sha256(part):
        return
    if path.name.startswith("state-") or path.name in _named(path.parent):
        part.unlink()
        raise RefusedError(f"it writes {path.name} of a checkpoint again, with another content")


def _named(folder: Path) -> set[str]:
    """Name the files that the whole states of a checkpoint name."""
    found: set[str] = set()
    for state in folder.glob("state-*"):
        with contextlib.suppress(DamagedError):
            found |= named_files(state.read_bytes())
    return found


def _empty_of_parts(folder: Path) -> None:
    """Remove what an interrupted bridge has left in an empty folder."""
    for path in folder.iterdir():
        if path.name.startswith(files.PART_PREFIX):
            path.unlink()
