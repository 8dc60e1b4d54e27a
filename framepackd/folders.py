"""Recognizes the outbox, the failed folder and the inbox when their disks come and go.

Outbox and failed folder hold a marker file, and the state folder remembers its text. If another folder is in
their place, most often the empty one on which a share is mounted, nothing is delivered: the files would lie
hidden when the share is back.
"""

import contextlib
import errno
import json
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from framepackd import files, rights
from framepackd.files import UNREACHABLE
from framepackd.settings.config import Config

MARKER = ".framepackd.marker"
RECORD = "folders.json"  # in the state folder: path -> text of its marker; of an inbox only that it was there
MARKED = ("outbox", "failed")
NOT_THERE = "is not there: mount its disk or share"
ANOTHER = "is not the folder that it was: its disk or share is not mounted, or it was made anew. Mount it"
ACCEPT = "; if this is the right place from now on, run framepackd check --accept-folders"
CLOSED = "may not be moved or written by this user: correct its owner or rights"
# Errors of moves, with what to do.
REMEDIES = UNREACHABLE | {
    errno.EROFS: "is read-only: mount it for writing",
    errno.ENOSPC: "is full: make room",
    errno.EDQUOT: "has no more room for this user: raise the quota or make room",
    errno.EACCES: CLOSED,
    errno.EPERM: CLOSED,
}
_recording = threading.Lock()


class FolderError(OSError):
    """Another folder is in the place of one of ours, or none; the text says what to do."""

    def __init__(self, path: Path, words: str) -> None:
        """Take the folder, and words that say what is wrong with it and what to do."""
        super().__init__(errno.ENOTCONN, words, str(path))

    def __str__(self) -> str:
        """Give folder and words as a sentence."""
        return f"{self.filename} {self.strerror}"


@contextmanager
def opened(key: str, config: Config) -> Iterator[None]:
    """Hold the outbox or the failed folder open while files move, so that nobody can unmount it.

    On the first use it is made and marked.

    Raises:
        FolderError: another folder is in its place, or none.
        OSError: it cannot be made, read or written.
    """
    path: Path = getattr(config, key)
    known = _record(config).get(str(path))
    if known is None:
        accept(key, config)
        known = _record(config)[str(path)]
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FolderError(path, NOT_THERE + ACCEPT) from error
    try:
        if _marker(Path(f"/proc/self/fd/{folder}")) != known:
            raise FolderError(path, ANOTHER + ACCEPT)
        yield
    finally:
        os.close(folder)


def trouble(key: str, config: Config) -> str | None:
    """Say why a folder cannot be used; None if it can, or was never used before."""
    path: Path = getattr(config, key)
    if str(path) not in _record(config):
        return None
    if key not in MARKED:
        return None if path.is_dir() else f"{path} {NOT_THERE}"
    try:
        with opened(key, config):
            return None
    except FolderError as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def accept(key: str, config: Config) -> None:
    """Accept the folder that is there now as the right one; make it if it is missing.

    Raises:
        OSError: it cannot be made, read or written.
    """
    path: Path = getattr(config, key)
    files.make_folder(path, rights.mode_of(path, config))
    said = ""
    if key in MARKED:
        said = _marker(path)
        if not said:
            said = f"framepackd delivers here ({secrets.token_hex(8)}): leave this file where it is\n"
            files.write_text(path / MARKER, said)
            rights.share(path / MARKER)
    with _recording:
        files.write_json(config.state_dir / RECORD, _record(config) | {str(path): said})


def make_new(config: Config) -> None:
    """Make and mark the folders that were never used before; wait for the others.

    One that cannot be marked now, perhaps because it is read-only, is marked at its first use: ``opened``.

    Raises:
        OSError: one cannot be made.
    """
    for key in ("inbox", *MARKED):
        path: Path = getattr(config, key)
        if str(path) not in _record(config):
            files.make_folder(path, rights.mode_of(path, config))
            with contextlib.suppress(OSError):
                accept(key, config)


def why(error: OSError, key: str, config: Config) -> tuple[str, bool]:
    """Say why files cannot be moved and what to do, and whether that holds for all files of this folder."""
    root: Path = getattr(config, key)
    if isinstance(error, FolderError):
        return f"{key} {error}", True
    place = Path(str(error.filename2 or error.filename or root))
    if error.errno not in REMEDIES:
        return f"{error.strerror}: {place}", False
    # Missing rights may concern a single folder below; any other error concerns the whole disk.
    for_all = error.errno not in (errno.EACCES, errno.EPERM) or root in (place, place.parent)
    where = f"{key} {root}" if for_all and place.is_relative_to(root) else str(place)
    return f"{where} {REMEDIES[error.errno]}", for_all


def _marker(folder: Path) -> str:
    """Read a folder's marker; empty if there is none."""
    try:
        return (folder / MARKER).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _record(config: Config) -> dict[str, str]:
    with contextlib.suppress(FileNotFoundError, ValueError):  # damaged: as if no folder was ever seen
        read = json.loads((config.state_dir / RECORD).read_text(encoding="utf-8"))
        return {str(path): str(said) for path, said in read.items()}
    return {}
