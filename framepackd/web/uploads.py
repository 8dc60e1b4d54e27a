"""Keeps uploads until they are dropped into the inbox, and limits their size."""

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from framepackd.files import filesystem_type
from framepackd.settings.config import Config
from framepackd.text import size_text

log = logging.getLogger(__name__)

RAM_DISKS = ("tmpfs", "ramfs")
KEPT_SECONDS = 1800  # as long as somebody may take to write a prompt for a picture
LEAST_BYTES = 1 << 16  # that any file counts for: this limits tiny ones too
SPARE_BYTES = 256 * 10**6  # of the disk, which the job store needs too
PREFIX = "web-"


class UploadError(Exception):
    """An upload is refused; the text says why."""

    def __init__(self, status: int, text: str) -> None:
        """Take the status of the answer, and the reason."""
        super().__init__(text)
        self.status = status


class Uploads:
    """Counts the uploads in a folder and removes old ones."""

    def __init__(self, folder: Path, *, limit: int, quota: int) -> None:
        """Take the folder, and the bytes that one upload and all in the folder may have."""
        self._folder = folder
        self._limit = limit
        self._quota = quota
        self._lying = 0
        self._received = 0  # since the start
        self._coming = 0  # uploads under way

    @asynccontextmanager
    async def coming(self, declared: int) -> AsyncIterator[Callable[[int], None]]:
        """Admit an upload of a declared size; gives the function that counts its bytes as they come.

        Raises:
            UploadError: there is no room for it; that function raises it too.
        """
        self._check_size(declared)
        self._coming += 1
        size = 0

        def count(more: int) -> None:
            nonlocal size
            size += more
            self._received += more
            self._lying += more
            self._check_size(size)
            self._check_quota(0)

        try:
            before = self._received
            lying = await asyncio.to_thread(self.sweep)
            self._lying = lying + self._received - before
            self._check_quota(declared)
            self._check_disk(declared)
            yield count
        finally:
            self._coming -= 1
            if not self._coming:
                self._remove_unfinished()

    def _check_size(self, size: int) -> None:
        if size > self._limit:
            raise UploadError(
                413,
                f"this upload is larger than the {size_text(self._limit)} it may have: send a smaller file, "
                "or raise upload_limit_mb under [web] in framepackd's configuration",
            )

    def _check_quota(self, more: int) -> None:
        if self._lying + more > self._quota:
            raise UploadError(
                507,
                f"the uploads of the last {KEPT_SECONDS // 60} minutes take up the {size_text(self._quota)} "
                "they may have: try again later, or raise upload_quota_mb under [web] in framepackd's "
                "configuration",
            )

    def _check_disk(self, declared: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < declared + SPARE_BYTES:
            raise UploadError(
                507,
                f"the disk of {self._folder.parent} has {size_text(free)} left, too little for this upload: "
                "make room there",
            )

    def sweep(self) -> int:
        """Remove old files; gives the bytes of the others."""
        lying, oldest = 0, time.time() - KEPT_SECONDS
        for root, folders, files in os.walk(self._folder, topdown=False):
            for name in (*files, *folders):
                path = Path(root) / name
                with contextlib.suppress(OSError):  # removed by the page itself; a folder that is not empty
                    status = path.lstat()
                    folder = stat.S_ISDIR(status.st_mode)
                    if status.st_ctime < oldest and Path(root) != self._folder:
                        path.rmdir() if folder else path.unlink()
                    elif not folder:
                        lying += max(status.st_size, LEAST_BYTES)
        return lying

    def _remove_unfinished(self) -> None:
        """Remove uploads that broke off; finished ones lie in folders of their own."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(received(self._folder)):
                if entry.is_file(follow_symlinks=False):
                    Path(entry).unlink(missing_ok=True)


def received(folder: Path) -> Path:
    """Give the folder of the uploads."""
    return folder / "uploads"


def temporary(folder: Path) -> Path:
    """Give the folder of this process's temporary files."""
    return folder / "tmp"


@contextmanager
def own_folder(config: Config) -> Iterator[Path]:
    """Make a folder on a disk for this process, as long as it runs; remove those of dead processes.

    Raises:
        OSError: there is no place where this user may write.
    """
    base = _base(config)
    with _locked(base):
        _remove_dead(base)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        _lock(descriptor)
    try:
        for below in (received(folder), temporary(folder)):
            below.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _base(config: Config) -> Path:
    """Choose the state folder, which is on a local disk with room for jobs, else the cache folder.

    /tmp may be a RAM disk, the inbox a share.
    """
    made = []
    for base in (config.state_dir / "web", config.cache_dir / "web"):
        try:
            base.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            base.mkdir(mode=0o700, exist_ok=True)
            tempfile.TemporaryFile(dir=base).close()
        except OSError as error:
            refused = error
            continue
        if filesystem_type(base) not in RAM_DISKS:
            return base
        made.append(base)
    if not made:
        raise OSError(
            f"uploads need a place on a disk, and {refused.filename} cannot be written ({refused.strerror}): "
            "let this user write into the state folder"
        )
    log.warning(
        "the state folder and the cache folder are in memory (%s), and so are uploads: "
        "set state_dir to a folder on a disk",
        made[0],
    )
    return made[0]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: then no process counts as dead
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the lock of an open folder, which is held until its process ends; gives whether it was free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_dead(base: Path) -> None:
    """Remove the folders of processes that were killed."""
    for folder in base.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if _lock(descriptor):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
