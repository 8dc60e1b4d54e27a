"""Writes files whole or not at all and durably, follows no links of others, and renames over nothing."""

import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

SILENT = "is of a share whose server does not answer: look after the server and the network"
UNREACHABLE = {
    errno.ESTALE: "is of a share that its server has exported anew: unmount it and mount it again",
    errno.ENOTCONN: "is of a share that is not connected any more: unmount it and mount it again",
    errno.EHOSTDOWN: SILENT,
    errno.EHOSTUNREACH: SILENT,
    errno.ETIMEDOUT: SILENT,
    errno.EIO: "cannot be used: its disk or share fails, look into the kernel's log (dmesg)",
}

PART_PREFIX = ".framepackd-"  # hidden, and ours: the start may remove such files
COPIED_AT_ONCE = 1 << 20
READABLE = 0o055  # a folder, by group and others
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100


class Observer(Protocol):
    """Is told what this process has done to files, from the thread that did it."""

    def written(self, path: Path, *, durable: bool) -> None:
        """Take note of a file that is written and has its name; a crash may lose one that is not durable."""

    def removed(self, path: Path) -> None:
        """Take note that a file is not there, whether or not it was."""

    def moved(self, source: Path, target: Path) -> None:
        """Take note that a file or folder has another name, durably."""


_observer: Observer | None = None


def observe(observer: Observer | None) -> None:
    """Have an observer told of what is written with this module from now on; None: nobody."""
    global _observer
    _observer = observer


def tell_written(path: Path, *, durable: bool = True) -> None:
    """Tell the observer of a file that was written by other means."""
    if _observer is not None:
        _observer.written(path, durable=durable)


def tell_moved(source: Path, target: Path) -> None:
    """Tell the observer of a file or folder that was renamed, once that is durable."""
    if _observer is not None:
        _observer.moved(source, target)


def remove(path: Path) -> None:
    """Remove a file if it is there, and tell the observer."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    if _observer is not None:
        _observer.removed(path)


def sync_folder(folder: Path) -> None:
    """Make renames into and out of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path, mode: int | None = None) -> None:
    """Make a folder, and those above it that are missing; durable, so that files in it can be.

    Without ``mode``, and whatever the umask: in a setgid folder it gets that folder's mode, in another one it
    is readable for those who can read that one. Missing folders above one with a ``mode`` let the same people
    through, and give no other rights.
    """
    if not folder.is_dir():
        make_folder(folder.parent, None if mode is None else mode & 0o755)
        folder.mkdir(0o777 if mode is None else mode & 0o777, exist_ok=True)
        _open_folder(folder, mode)
        sync_folder(folder.parent)


def _open_folder(folder: Path, mode: int | None) -> None:
    above = stat.S_IMODE(folder.parent.stat().st_mode)
    if mode is None:
        if has_default_acl(folder):
            return
        mode = above if above & stat.S_ISGID else stat.S_IMODE(folder.stat().st_mode) | above & READABLE
    if stat.S_IMODE(folder.stat().st_mode) != mode:
        with contextlib.suppress(PermissionError):  # a sandbox, or a file system without such rights
            folder.chmod(mode)


def has_default_acl(folder: Path) -> bool:
    """Say whether a folder has a default ACL, which sets the rights of what is made in it."""
    try:
        return bool(os.getxattr(folder, "system.posix_acl_default"))
    except OSError:
        return False


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def folder_below(root: Path, folder: str) -> Iterator[Path]:
    """Open a folder below another, through no symbolic link, and give a path to just that folder.

    The path goes through its descriptor, so it means this folder even if another takes its name meanwhile.

    Raises:
        OSError: it is not there, or is no folder.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in PurePosixPath(folder).parts:
            above = descriptor
            descriptor = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
            os.close(above)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file that others may have put there: no link, no device, no pipe that would never be written.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    named = os.open(path, os.O_PATH | os.O_NOFOLLOW)  # opens nothing yet
    try:
        if not stat.S_ISREG(os.fstat(named).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        with Path(f"/proc/self/fd/{named}").open("rb") as file:
            yield file
    finally:
        os.close(named)


def copy(source: Path, target: Path) -> None:
    """Copy a file's content and times, durable when it returns; not its rights, owner and links.

    Copies as much as the file has at the start: it may grow without end.

    Raises:
        OSError: it cannot be read, is not a regular file, or there is no room.
    """
    with open_regular(source) as original, target.open("wb") as copied:
        status = os.fstat(original.fileno())
        left = status.st_size
        while left and (block := original.read(min(left, COPIED_AT_ONCE))):
            copied.write(block)
            left -= len(block)
        copied.flush()
        os.utime(copied.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
        os.fsync(copied.fileno())


def rename_to_free_name(source: Path, target: Path) -> None:
    """Rename to a name or, if it is taken, to the next free NAME_001, NAME_002 ...

    Raises:
        OSError: it cannot be renamed.
    """
    for free in free_names(target):
        with contextlib.suppress(FileExistsError):
            rename_new(source, free)
            return


def free_names(target: Path) -> Iterator[Path]:
    """Give names to try one after the other: NAME, NAME_001, NAME_002 ..."""
    for number in itertools.count():
        yield target.with_name(f"{target.stem}_{number:03}{target.suffix}") if number else target


def discard_folder(folder: Path) -> None:
    """Remove a folder of ours: hide it by renaming, in one step, then delete it.

    What a crash or an error leaves of it has a hidden name, and the next start removes it.

    Raises:
        OSError: it is a symbolic link, or its name cannot be removed; nothing has changed.
    """
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link", str(folder))
    hidden = hidden_part(folder)
    if hidden.exists():
        shutil.rmtree(hidden)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def hidden_part(path: Path) -> Path:
    """Give the hidden name of a file or folder that is not whole yet, or no more."""
    return path.with_name(f"{PART_PREFIX}{path.name}.part")


@contextmanager
def written_aside(path: Path, *, named: bool = True) -> Iterator[Path]:
    """Give the hidden name to write a file under; after the block the file is durable and has its own name.

    The name is durable only if ``named``. If the block fails, what it wrote keeps the hidden name.
    """
    part = hidden_part(path)
    yield part
    sync_file(part)
    part.replace(path)
    if named:
        sync_folder(path.parent)
    tell_written(path)


def write_all(descriptor: int, block: bytes) -> None:
    """Write a block; one call of the system may write a part of it only."""
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_bytes(path: Path, content: bytes, *, named: bool = True) -> None:
    """Write a file whole or not at all; durable when it returns, its name only if ``named``."""
    with written_aside(path, named=named) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people and programs, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """Give the hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rename_new(source: Path, target: Path) -> None:
    """Rename to a name that must be free, in one step."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE):
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(source), None, str(target))
        _rename_new_by_other_means(source, target)


def _rename_new_by_other_means(source: Path, target: Path) -> None:
    """Rename where the file system does not know the flag, as some network file systems."""
    try:
        os.link(source, target)  # fails if the name is taken
    except FileExistsError:
        raise
    except OSError:  # nor does it know links: take the name with an empty file, which is then replaced
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        source.replace(target)
    else:
        source.unlink()


def filesystem_type(path: Path) -> str:
    """Give the type of the file system a path is on, from /proc/self/mountinfo; empty if unknown."""
    return mount_of(path)[1]


def mount_of(path: Path) -> tuple[str, str]:
    """Give the mount point and the type of the file system that a path is on; both empty if unknown."""
    place, kind = "", ""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return place, kind
    resolved = path.resolve()
    for line in lines:
        fields, _, rest = line.partition(" - ")
        # Blanks and the like are written as \\040; of two mounts on one point the later is on top.
        mount = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields.split()[4])
        if resolved.is_relative_to(mount) and len(mount) >= len(place):
            place, kind = mount, rest.split()[0]
    return place, kind
