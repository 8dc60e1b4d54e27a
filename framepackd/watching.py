"""Watch the inbox: events of the file system wake whoever decides. They may get lost; scans do not."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from framepackd.config import Config, poll_seconds

log = logging.getLogger(__name__)


@contextmanager
def watching(config: Config, wake: Callable[[], None]) -> Iterator[None]:
    """Watch the inbox while inside; where that cannot be, the regular scans do alone."""
    observer = Observer()
    observer.schedule(_Waker(wake), str(config.inbox), recursive=True)
    try:
        observer.start()
    except OSError as error:
        # Out of inotify watches or instances.
        log.warning(
            "the inbox cannot be watched (%s): looking every %.0f s instead; "
            "raise fs.inotify.max_user_watches or max_user_instances",
            error.strerror,
            poll_seconds(config),
        )
        yield
        return
    try:
        yield
    finally:
        # watchdog 7 calls its own orderly end an error.
        logging.getLogger("watchdog").setLevel(logging.CRITICAL)
        observer.stop()
        observer.join()


class _Waker(FileSystemEventHandler):
    """Every event means the same: look again."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type not in ("opened", "closed_no_write"):  # what our own scans cause
            self._wake()
