"""Tells systemd that the daemon is ready, what it does, and that it lives (sd_notify(3))."""

import contextlib
import os
import socket
import time
from collections.abc import Callable

STATUS_SECONDS = 1.0  # at least, between two, however fast the steps are
STATUS_SHARE = 0.05  # of the loop's time, at most: with ten thousand jobs the status takes most of a second
SEND_SECONDS = 5.0  # at most, to a systemd that does not read
STOP_USEC = 30_000_000  # a stop in progress asks for this much time in every round


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
    """Report that the configuration is being read again; READY=1 reports the end of it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


class Reporter:
    """Informs systemd from the rounds of the loop only: a loop that hangs falls silent."""

    def __init__(self, status: Callable[[], str]) -> None:
        """Take ``status``, which gives one line; it is called only if systemd listens."""
        self._status = status
        self._said = ""
        self._next_status = 0.0 if os.environ.get("NOTIFY_SOCKET") else float("inf")
        self._stale = False  # there was a round since the status was said
        self._feed_seconds = _feed_seconds()
        self._next_feed = 0.0 if self._feed_seconds < float("inf") else float("inf")
        self._stopping = False

    def round(self, *, stopping: bool) -> None:
        """Report that the loop is alive, and the status if it has changed."""
        now = time.monotonic()
        if now >= self._next_feed:
            self._next_feed = now + self._feed_seconds
            notify("WATCHDOG=1")
        if stopping:
            notify(*([] if self._stopping else ["STOPPING=1"]), f"EXTEND_TIMEOUT_USEC={STOP_USEC}")
            self._stopping = True
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
    """Give a quarter of the watchdog's timeout: even two such intervals are in time."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    meant = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(microseconds) / 4e6 if meant and microseconds.isdecimal() else float("inf")
