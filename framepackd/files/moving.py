"""Moves files so that a power cut at any line leaves each whole, in exactly one of two places."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from framepackd import files

DURABLE_EVERY = 16 << 20  # bytes of a copy; at 1 MB/s it answers a stop within 16 s
ACL = "system.posix_acl_access"


class StoppedError(Exception):
    """A copy was told to stop; what was copied is kept, and the same call resumes from there."""


@dataclass
class Progress:
    """How many bytes have been moved, of how many; one thread counts, others read and may stop the move."""

    done: int = 0
    total: int = 0
    stop: Callable[[], bool] = lambda: False  # asked between two blocks


def move(
    source: Path,
    target: Path,
    *,
    part: str,
    note: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Move a file to a name that is free, across file systems too; durable when it returns.

    On one file system this is a single rename. Across two, the file is copied to a hidden ``part`` beside
    the target, which is made durable and renamed; only then is the source removed. Either way the file gets
    the group, mode and ACL of one that is new in the target's folder.

    ``note`` is a file that no other move uses meanwhile, on a disk of ours; by default it is beside the
    source. It records how much of the part is durable, and that the part is about to be renamed. So a call
    that is repeated with the same names, after a crash or a stop, resumes the last one. Where there is no
    source, the file was moved.

    Raises:
        FileExistsError: the target's name is taken; the source is where it was.
        StoppedError: ``progress.stop`` said so, between two blocks.
        OSError: it cannot be read or written.
    """
    hidden = part_beside(target, part)
    noted = _Note(note or source.with_name(f"{files.PART_PREFIX}{part}.moving"), source, hidden)
    progress = progress or Progress()
    if not source.exists():
        if hidden.exists() and not noted.path.exists():
            files.rename_new(hidden, target)  # an older version removed the source first, and was interrupted
            files.sync_folder(target.parent)
        return
    if noted.begun or not _renamed(source, target, hidden, progress):
        if not was_moved(source, target, part=part, note=noted.path):
            _copy_over(source, target, hidden, noted, progress)
        files.sync_folder(target.parent)
        source.unlink()
    files.sync_folder(source.parent)  # before the note is gone: without it the file would be moved again
    noted.path.unlink(missing_ok=True)
    files.sync_folder(target.parent)


def part_beside(target: Path, part: str) -> Path:
    """Give the hidden file that ``move`` copies to."""
    return target.with_name(f"{files.PART_PREFIX}{part}.part")


def was_moved(source: Path, target: Path, *, part: str, note: Path) -> bool:
    """Say whether ``move`` was interrupted between giving the file its name and removing the source.

    Somebody may have taken the file away since. In doubt, as with another disk in the target's place: no.

    Raises:
        OSError: the target cannot be read.
    """
    noted = _Note(note, source, part_beside(target, part))
    if noted.device is None or _is_there(part_beside(target, part)):
        return False
    if _is_there(target) and target.lstat().st_size == source.stat().st_size:
        return True
    return target.parent.stat().st_dev == noted.device


def _is_there(path: Path) -> bool:
    """Say whether a name is taken; unlike ``exists``, raises an error where that cannot be seen."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _refuse_taken(target: Path) -> None:
    if _is_there(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))


class _Note:
    """Records how much of a part is durable, and of which source; a note of another move is ignored."""

    def __init__(self, path: Path, source: Path, hidden: Path) -> None:
        self.path = path
        self.bytes = 0
        self.device: int | None = None  # of the part, when it was about to be renamed
        self.target = ""  # to what
        self._of = {"part": str(hidden), "source": _version(source)}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(path.read_bytes())
            if {key: found[key] for key in self._of} == self._of:
                self.bytes, self.device, self.target = found["bytes"], found["device"], found["target"]

    @property
    def begun(self) -> bool:
        """Whether there is a part to resume, or one that was about to be renamed."""
        return self.bytes > 0 or self.device is not None

    def write(self, size: int, *, device: int | None = None, target: str = "") -> None:
        self.bytes, self.device, self.target = size, device, target
        said = {**self._of, "bytes": size, "device": device, "target": target}
        # Progress may be forgotten; that a rename is due may not.
        files.write_bytes(self.path, json.dumps(said).encode(), named=device is not None)

    def forget(self) -> None:
        """Remove the note before another part is begun."""
        self.bytes = 0
        if self.path.exists():
            self.path.unlink()
            files.sync_folder(self.path.parent)


def _version(path: Path) -> list[int]:
    with contextlib.suppress(OSError):
        status = path.lstat()
        return [status.st_size, status.st_mtime_ns]
    return []


def _linked(source: Path, target: Path) -> bool:
    """Say whether both are one file: an interrupted rename by a link, whose old name is still there."""
    return source.exists() and target.exists() and target.samefile(source)


def _renamed(source: Path, target: Path, hidden: Path, progress: Progress) -> bool:
    """Rename a file if it can have the rights it should; says whether it did, else copy the file."""
    if source.parent.stat().st_dev != target.parent.stat().st_dev:
        return False
    if _linked(source, target):
        source.unlink()
        return True
    _refuse_taken(target)
    size = source.lstat().st_size
    if not _take_on_rights(source, hidden):
        return False
    try:
        files.rename_new(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    progress.done += size
    return True


def _take_on_rights(path: Path, hidden: Path) -> bool:
    """Give a file the group, mode and ACL of a new one in a folder; says whether that is allowed.

    A new file is made to see what it has: the kernel knows setgid and default ACLs.
    """
    new = _create_nameless(hidden)
    wanted, acl = os.fstat(new), _acl(new)
    os.close(new)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except PermissionError:  # somebody else's, and not for us
        return True
    try:
        _set_rights(descriptor, wanted, acl)
    except OSError as error:  # not a member of that group, or not the file's owner
        if error.errno != errno.EPERM:
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def _create_nameless(hidden: Path) -> int:
    """Make a nameless file beside a part, which is gone when it is closed; gives its descriptor."""
    try:
        descriptor = os.open(hidden.parent, os.O_RDWR | os.O_TMPFILE, 0o666)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        descriptor = _create(hidden)  # its file system knows no files without a name
        hidden.unlink()
    else:
        _open_as_folder(descriptor, hidden.parent)
    return descriptor


def _create(hidden: Path) -> int:
    """Make an empty part and give its descriptor."""
    hidden.unlink(missing_ok=True)  # of an earlier call, or put there: what it links to is not written to
    descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    _open_as_folder(descriptor, hidden.parent)
    return descriptor


def _open_as_folder(descriptor: int, folder: Path) -> None:
    """Have those who can read the folder read a new file and, if it is setgid, its group write it.

    The umask is meant for our own folders. A default ACL, which the kernel has applied, wins.
    """
    if not files.has_default_acl(folder):
        mode = folder.stat().st_mode
        with contextlib.suppress(OSError):  # a file system without such rights
            os.fchmod(descriptor, 0o600 | mode & (0o064 if mode & stat.S_ISGID else 0o044))


def _set_rights(descriptor: int, wanted: os.stat_result, acl: bytes | None) -> None:
    had, had_acl = os.fstat(descriptor), _acl(descriptor)
    if (had.st_gid, had.st_mode, had_acl) == (wanted.st_gid, wanted.st_mode, acl):
        return
    if had.st_gid != wanted.st_gid:
        os.fchown(descriptor, -1, wanted.st_gid)
    if had_acl is not None and acl is None:
        os.removexattr(descriptor, ACL)
    elif had_acl != acl and acl is not None:
        os.setxattr(descriptor, ACL, acl)
    os.fchmod(descriptor, stat.S_IMODE(wanted.st_mode))  # after the ACL, whose mask it is
    os.fsync(descriptor)


def _acl(descriptor: int) -> bytes | None:
    with contextlib.suppress(OSError):  # it has none, or the file system knows none
        return os.getxattr(descriptor, ACL)
    return None


def _copy_over(source: Path, target: Path, hidden: Path, noted: _Note, progress: Progress) -> None:
    """Copy a file to its part and rename that, all durable; resumes an interrupted call."""
    if _linked(hidden, target):
        hidden.unlink()
        return
    size = source.stat().st_size
    if size and noted.target == target.name and _is_there(target) and not target.lstat().st_size:
        target.unlink()  # took the name for it, before a crash: see _rename_new_by_other_means
    _refuse_taken(target)
    _copy_on(source, hidden, noted, progress)
    files.sync_folder(target.parent)
    noted.write(size, device=hidden.stat().st_dev, target=target.name)
    files.rename_new(hidden, target)


def _copy_on(source: Path, hidden: Path, noted: _Note, progress: Progress) -> None:
    """Copy the rest of a file to its part; durable when it returns.

    Copies as much as the source has at the start: it may grow without end.
    """
    with files.open_regular(source) as original:
        status = os.fstat(original.fileno())
        durable = _same_so_far(original, hidden, noted.bytes)
        if not durable:
            noted.forget()
        part = os.open(hidden, os.O_RDWR | os.O_NOFOLLOW) if durable else _create(hidden)
        with os.fdopen(part, "r+b", buffering=0) as copied:
            original.seek(durable)
            copied.seek(durable)
            copied.truncate()
            progress.done += durable
            while left := status.st_size - copied.tell():
                if progress.stop():
                    raise StoppedError(f"{source.name}: {left} bytes are left to be copied")
                block = original.read(min(left, files.COPIED_AT_ONCE))
                if not block:
                    raise OSError(errno.EIO, "became shorter while it was copied", str(source))
                files.write_all(copied.fileno(), block)
                progress.done += len(block)
                if copied.tell() - durable >= DURABLE_EVERY:
                    durable = copied.tell()
                    os.fsync(copied.fileno())
                    noted.write(durable)
            with contextlib.suppress(OSError):  # some file systems keep no times
                os.utime(copied.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
            os.fsync(copied.fileno())


def _same_so_far(original: BinaryIO, hidden: Path, durable: int) -> int:
    """Give the bytes of a part that can be kept: those noted, if they are there and their end is the same."""
    try:
        with files.open_regular(hidden) as copied:
            durable = min(durable, os.fstat(copied.fileno()).st_size)
            compared = min(durable, files.COPIED_AT_ONCE)
            for file in (original, copied):
                file.seek(durable - compared)
            return durable if original.read(compared) == copied.read(compared) else 0
    except OSError:  # none is there
        return 0
