"""Tells systemd READY=1, its status and the watchdog (sd_notify(3)); without systemd nothing."""

import contextlib
import os
import socket
import time
from collections.abc import Callable

STATUS_SECONDS = 1.0  # at most this often, however fast steps follow each other
STATUS_SHARE = 0.05  # of the loop's time, at most: of ten thousand jobs the status takes most of a second
SEND_SECONDS = 5.0  # to a systemd that does not read: the videos go on without it
STOP_USEC = 30_000_000  # what a stop in progress asks for, again in every round


def notify(*assignments: str) -> None:
    """Send assignments such as READY=1, together, if systemd listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    message = "\n".join(assignments).encode("utf-8", "replace")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier, contextlib.suppress(OSError):
        notifier.settimeout(SEND_SECONDS)
        notifier.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        notifier.send(message)


def reloading() -> None:
    """Say that the configuration is read again; READY=1 says that this is over."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


class Reporter:
    """Keeps systemd informed from the rounds of the loop, and only from there: who hangs falls silent."""

    def __init__(self, status: Callable[[], str]) -> None:
        """Take what gives the status in one line; it is asked only if systemd listens."""
        self._status = status
        self._said = ""
        self._next_status = 0.0 if os.environ.get("NOTIFY_SOCKET") else float("inf")
        self._stale = False  # there was a round since the status was said
        self._feed_seconds = _feed_seconds()
        self._next_feed = 0.0 if self._feed_seconds < float("inf") else float("inf")
        self._stopping = False

    def feed(self) -> None:
        """Say that the loop gets on with its work."""
        now = time.monotonic()
        if now >= self._next_feed:
            self._next_feed = now + self._feed_seconds
            notify("WATCHDOG=1")

    def round(self, *, stopping: bool) -> None:
        """Say that the loop went round, and what is going on."""
        self.feed()
        if stopping:
            notify(*([] if self._stopping else ["STOPPING=1"]), f"EXTEND_TIMEOUT_USEC={STOP_USEC}")
            self._stopping = True
        now = time.monotonic()
        self._stale = now < self._next_status
        if self._stale:
            return
        status = self._status()
        self._next_status = now + max(STATUS_SECONDS, (time.monotonic() - now) / STATUS_SHARE)
        if status != self._said:
            notify(f"STATUS={status}")
            self._said = status

    @property
    def patience(self) -> float:
        """How many seconds the loop may wait before its next round."""
        status = self._next_status - time.monotonic() if self._stale else float("inf")
        return min(max(status, 0.0), self._feed_seconds)


def _feed_seconds() -> float:
    """Give a quarter of what systemd waits for: two rounds that far apart are still in time."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    meant = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(microseconds) / 4e6 if meant and microseconds.isdecimal() else float("inf")
