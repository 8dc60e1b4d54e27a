"""Looks into the inbox again and again: is it there, what has settled; makes jobs of what has.

A round runs in its own thread: the daemon's loop waits for no disk.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from framepackd.apart import SILENT_SECONDS
from framepackd.files import mount_of
from framepackd.folders import FolderError
from framepackd.inbox.forgotten import forgotten
from framepackd.inbox.naming import Group
from framepackd.inbox.scan import Came, Inbox, Scan, Waiting, trouble
from framepackd.inbox.watch import Watch
from framepackd.intake import claiming, take
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.settings.config import Config, poll_seconds

log = logging.getLogger(__name__)

SCAN_SECONDS = 0.25  # at most this often, however many events arrive
INTAKE_SECONDS = 0.5  # of taking in, before the next scan ...
SCAN_SHARE = (
    0.25  # ... and until the scan, whose time grows with the inbox, was at most this share of the work
)
LONGEST_INTAKE_SECONDS = 20.0  # on a slow disk; status shows the outcome of a round only at its end
FRESH_SECONDS = 1.0  # before the folders are listed again, for files that came since the scan
MAX_WAITING = 20  # names to log one by one
RETRY_SECONDS = 30.0  # before another try, if space or rights were missing


@dataclass(frozen=True)
class Looked:
    """The outcome of a round."""

    waiting: tuple[Waiting, ...] = ()
    problems: tuple[Problem, ...] = ()
    idle: bool = False  # nothing is left to take or still changing
    again: float = 0.0  # seconds until the next round

    def tell_what_waits(self) -> None:
        """Log what stays in the inbox, and why: after ``run --once`` there is no daemon to ask."""
        for entry in self.waiting[:MAX_WAITING]:
            name = f"{entry.folder}/{entry.name}".lstrip("/")
            reason = entry.missing if " " in entry.missing else f"it waits for {entry.missing}"
            log.warning("%s is left in the inbox: %s", name, reason)
        if len(self.waiting) > MAX_WAITING:
            log.warning("%d more are left in the inbox", len(self.waiting) - MAX_WAITING)


class Rounds:
    """Goes through the inbox; only one thread at a time may call it."""

    def __init__(self, config: Config, store: JobStore, wake: Callable[[], None]) -> None:
        """Scan nothing yet; another thread calls ``wake`` at each change in the inbox."""
        self._store = store
        self._inbox = Inbox(config.inbox, config.settle_seconds)
        self._watch = Watch(wake)
        self._mount = ""  # where the inbox's file system is mounted
        self._adopt_again = 0.0  # when leftovers are adopted again, on the monotonic clock
        self._left: tuple[Problem, ...] = ()  # leftovers that cannot be adopted
        self._clear_held = 0.0
        self._waiting: tuple[Waiting, ...] = ()
        self._told: str | None = None

    def adopt_again(self) -> None:
        """Have the next round adopt what is half taken in."""
        self._adopt_again = 0.0

    def has_moved(self, config: Config) -> bool:
        """Say whether another folder than the watched one is at the inbox's path; quick."""
        try:
            return not self._watch.is_on(config.inbox)
        except OSError:  # gone: the next round says so
            return self._told is None

    def end(self) -> None:
        """Stop watching."""
        self._watch.end()

    def look(self, config: Config, stopping: Callable[[], bool]) -> Looked:
        """Go through the inbox once, and take in what is ready, or of thousands as many as justify a scan.

        Raises:
            StoreError: the database cannot be used.
        """
        self._inbox.settle_seconds = config.settle_seconds
        self._inbox.prompted = "prompt" in config.defaults
        self._adopt(config)
        try:
            self._find(config)
            begun = time.thread_time()
            scan = self._scan()
            scanned = time.thread_time() - begun
        except OSError as error:
            # Unmounted or closed: report it and touch nothing; queued jobs still run.
            return self._unreadable(config, error)
        self._told = None
        unfinished = self._take(scan, scanned, config, stopping)
        self._waiting = scan.waiting
        quiet = not scan.ready and not scan.unsettled
        polled = poll_seconds(config)
        again = polled if quiet else min(polled, max(config.settle_seconds / 4, SCAN_SECONDS))
        if self._inbox.held:
            again = min(again, max(self._clear_held - time.monotonic(), 0.0))
        if unfinished:
            again = 0.0
        elif self._left:
            again = min(again, RETRY_SECONDS)
        problems = (*self._left, *forgotten(scan.parts, config, self._store))
        return Looked(scan.waiting, problems, idle=quiet, again=again)

    def _find(self, config: Config) -> None:
        """Check that the inbox is still mounted, and watch it."""
        mount, kind = mount_of(config.inbox)
        if len(mount) < len(self._mount):
            words = f"lay on the disk or share at {self._mount}, which is not mounted now: mount it again"
            raise FolderError(config.inbox, words)
        if not self._watch.is_on(config.inbox):
            obstacle = self._watch.turn_to(config.inbox)
            log.info("watching %s (%s)", config.inbox, kind or "unknown")
            if obstacle is not None:
                log.warning("%s; until then it is scanned every %.0f s", obstacle, poll_seconds(config))
        self._mount = mount

    def _adopt(self, config: Config) -> None:
        """Adopt what was half taken in; complete work folders become jobs even while the inbox is away."""
        now = time.monotonic()
        if now < self._adopt_again:
            return
        try:
            left = take.adopt_leftovers(config, self._store).problems
        except OSError as error:
            left = [Problem("intake", f"{config.jobs_dir} cannot be looked through ({error.strerror})")]
        for problem in left:
            if problem not in self._left:
                log.error("%s", problem.text)
        self._left = tuple(left)
        self._adopt_again = now + RETRY_SECONDS if left else math.inf

    def _scan(self) -> Scan:
        if time.monotonic() >= self._clear_held:  # try again what could not be moved
            self._inbox.held.clear()
            self._clear_held = time.monotonic() + RETRY_SECONDS
        return self._inbox.scan(self._store.taken_as)

    def _take(self, scan: Scan, scanned: float, config: Config, stopping: Callable[[], bool]) -> bool:
        """Take in what is ready; says whether some is left. ``scanned``: CPU seconds of the scan."""
        begun, worked = time.monotonic(), time.thread_time()
        fresh_until, came = begun, dict[str, list[Came]]()
        unfinished = False
        for group in scan.ready:
            now = time.monotonic()
            worth_it = time.thread_time() - worked > scanned / SCAN_SHARE
            enough = INTAKE_SECONDS if worth_it else LONGEST_INTAKE_SECONDS
            if stopping() or now - begun > enough:
                return True
            if now > fresh_until:
                fresh_until, came = now + FRESH_SECONDS, {}
            try:
                if self._inbox.has_changed(group, came):
                    unfinished = True
                    continue
                take.take(group, config, self._store)
            except claiming.ChangedError:
                unfinished = True
            except claiming.HalfTakenError as error:
                self._adopt_again = 0.0
                self._hold(group, f"{group.name} {error.strerror}")
            except OSError as error:
                words = f"cannot be moved out of the inbox ({error.strerror}): check its permissions"
                self._hold(group, f"{group.name} {words}")
        return unfinished

    def _hold(self, group: Group, reason: str) -> None:
        """Do not take a group until all that are held are tried again."""
        self._inbox.held[group.folder, group.name] = reason
        log.warning("%s", reason)

    def _unreadable(self, config: Config, error: OSError) -> Looked:
        problem = trouble(config.inbox, error)
        if isinstance(error, FolderError):
            problem = Problem("inbox", f"the inbox {error}; queued jobs still run")
        if problem.text != self._told:
            log.warning("%s", problem.text)
        self._told = problem.text
        again = min(poll_seconds(config), RETRY_SECONDS)
        return Looked(self._waiting, (*self._left, problem), idle=True, again=again)


def silent_inbox(config: Config, seconds: float) -> tuple[Problem, ...]:
    """Report an inbox that has not answered for long."""
    if seconds < SILENT_SECONDS:
        return ()
    words = f"the inbox {config.inbox} has not answered for {seconds:.0f} s"
    return (Problem("inbox", f"{words}: look after its disk or its connection"),)
