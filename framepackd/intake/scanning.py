"""Scans the inbox when that is due, in a thread of its own: the daemon's loop waits for no disk."""

import math
import time
from collections.abc import Callable
from functools import partial

from framepackd.apart import Apart, within
from framepackd.intake.rounds import RETRY_SECONDS, SCAN_SECONDS, Looked, Rounds, silent_inbox
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.settings.config import Config

GLANCE_SECONDS = 5.0  # between two checks that the inbox is still the same folder
PATIENCE_SECONDS = 0.5  # a scan that takes no longer has its outcome in the same round
HURRY_SECONDS = 0.02  # while jobs run: a device may need its next one


class Scanning:
    """Decides when the inbox is scanned, and keeps what the last scan found."""

    def __init__(
        self, config: Config, store: JobStore, wake: Callable[[], None], stopping: Callable[[], bool]
    ) -> None:
        """Scan nothing yet.

        Args:
            config: where the inbox is.
            store: the jobs.
            wake: called from other threads, when the loop has something to do.
            stopping: says whether a scan is to take in no more.
        """
        self.config = config
        self.looked = Looked()
        self.changed = True  # something happened in the inbox since the last scan
        self.next_scan = self.next_glance = 0.0  # on the monotonic clock
        self.failed = False  # the inbox could not be read, or files not be taken in
        self._wake = wake
        self._stopping = stopping
        self._rounds = Rounds(config, store, self.wake)
        self._apart: Apart[Looked] = Apart("inbox", wake)

    def wake(self) -> None:
        """Have the inbox scanned soon; called from other threads, once for each change in it."""
        if not self.changed:  # else the loop knows: intake alone makes thousands of changes
            self.changed = True
            self._wake()

    def adopt_leftovers(self) -> None:
        """Have the next scan adopt what is half taken in."""
        self._rounds.adopt_again()

    @property
    def busy(self) -> bool:
        """Whether a scan is under way."""
        return self._apart.busy

    @property
    def idle(self) -> bool:
        """Whether all that lies in the inbox is taken in, or waits for more files."""
        return not self.changed and not self.busy and self.looked.idle

    @property
    def due(self) -> float:
        """When the next round has something to do, on the monotonic clock; a running scan wakes the loop."""
        return math.inf if self.busy else min(self.next_scan, self.next_glance)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Say what is wrong with the inbox, and whether it does not answer."""
        return (*self.looked.problems, *silent_inbox(self.config, self._apart.seconds))

    def round(self, now: float, *, hurry: bool = False) -> None:
        """Begin a scan if one is due, and take in the outcome of one that is over."""
        if self._apart.is_done():
            self._take_outcome()
        if now >= self.due and not self._stopping() and self._has_to_scan(now):
            self.changed = False
            self._apart.begin(partial(self._rounds.look, self.config, self._stopping))
            if self._apart.is_done(HURRY_SECONDS if hurry else PATIENCE_SECONDS):
                self._take_outcome()
        if self.changed:  # a change is scanned soon, but not each of a thousand
            self.next_scan = min(self.next_scan, time.monotonic() + SCAN_SECONDS)

    def end(self) -> None:
        """Stop watching, unless the disk of the inbox does not answer."""
        if not self.busy:
            self._rounds.end()

    def _has_to_scan(self, now: float) -> bool:
        """Say whether a scan is due, or another folder stands at the inbox's path."""
        self.next_glance = now + GLANCE_SECONDS
        glance = partial(self._rounds.has_moved, self.config)
        return now >= self.next_scan or within(
            PATIENCE_SECONDS, "glance at the inbox", glance, otherwise=False
        )

    def _take_outcome(self) -> None:
        self.looked = Looked(self.looked.waiting, self.looked.problems, again=RETRY_SECONDS)
        self.looked = self._apart.take()
        self.failed |= any(problem.code in ("inbox", "intake") for problem in self.looked.problems)
        self.next_scan = time.monotonic() + self.looked.again
