"""Watches the inbox: events wake the loop. Events may get lost; a regular scan finds what they missed."""

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from framepackd.files import mount_of

log = logging.getLogger(__name__)

END_SECONDS = 2.0  # for the threads of watchdog to end
Identity = tuple[int, int, str]  # device, inode, where its file system is mounted


class Watch:
    """Watches the folder at a path, and notices when another folder takes its place."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """Watch nothing yet; another thread calls ``wake`` at each change."""
        self._wake = wake
        self._observer: BaseObserver | None = None
        self._identity: Identity | None = None

    def is_on(self, folder: Path) -> bool:
        """Say whether the folder that is watched is still the one at this path.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        identity = _identity(folder)
        return identity == self._identity and (self._observer is None or _is_watched(identity))

    def turn_to(self, folder: Path) -> str | None:
        """Watch the folder that is at a path now; if the kernel refuses, says why.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        self.end()
        identity = _identity(folder)
        observer = Observer()
        observer.schedule(_Waker(self._wake), str(folder), recursive=True)
        self._identity = identity  # even if it cannot be watched: another try would not help
        try:
            observer.start()
        except OSError as error:
            return (
                f"the inbox cannot be watched ({error.strerror}): "
                "raise fs.inotify.max_user_watches or max_user_instances"
            )
        self._observer = observer
        return None

    def end(self) -> None:
        """Stop watching."""
        observer, self._observer, self._identity = self._observer, None, None
        if observer is not None:
            # watchdog 7 logs its own orderly end as an error.
            logging.getLogger("watchdog").setLevel(logging.CRITICAL)
            observer.stop()
            observer.join(END_SECONDS)


def _identity(folder: Path) -> Identity:
    status = folder.stat()
    return status.st_dev, status.st_ino, mount_of(folder)[0]


def _is_watched(identity: Identity) -> bool:
    """Say whether the kernel still watches a folder for us, which ends when its file system is unmounted.

    Mounted again, the folder may have the same device and inode.
    """
    device = os.major(identity[0]) << 20 | os.minor(identity[0])  # as the kernel writes it
    wanted = f" ino:{identity[1]:x} sdev:{device:x} "
    for descriptor in Path("/proc/self/fdinfo").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if wanted in descriptor.read_text():
                return True
    return False


class _Waker(FileSystemEventHandler):
    """Takes every event for a reason to scan."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type not in ("opened", "closed_no_write"):  # what our own scans cause
            self._wake()
