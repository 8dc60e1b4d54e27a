"""Goes round the inbox: is it there, what has settled, take it.

They run in a thread of their own: the loop waits for no disk.
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
INTAKE_SECONDS = 0.5  # of taking in, before the inbox is looked through again ...
SCAN_SHARE = 0.25  # ... and until a scan was no more than this much of the work: it grows with the inbox
LONGEST_INTAKE_SECONDS = 20.0  # on a slow disk; status tells of a round what it came to at its end
FRESH_SECONDS = 1.0  # before it is looked whether more files came to those that are ready
TOLD_WAITING = 20  # names, one by one
RETRY_SECONDS = 30.0  # before something that failed for want of space or rights is tried again


@dataclass(frozen=True)
class Looked:
    """What a round came to."""

    waiting: tuple[Waiting, ...] = ()
    problems: tuple[Problem, ...] = ()
    idle: bool = False  # nothing is left to take or to wait for
    again: float = 0.0  # seconds until the next round

    def tell_what_waits(self) -> None:
        """Log what stays in the inbox, and why: after ``run --once`` no daemon is there to be asked."""
        for entry in self.waiting[:TOLD_WAITING]:
            name = f"{entry.folder}/{entry.name}".lstrip("/")
            reason = entry.missing if " " in entry.missing else f"it waits for {entry.missing}"
            log.warning("%s is left in the inbox: %s", name, reason)
        if len(self.waiting) > TOLD_WAITING:
            log.warning("%d more are left in the inbox", len(self.waiting) - TOLD_WAITING)


class Rounds:
    """Goes through the inbox; one thread at a time."""

    def __init__(self, config: Config, store: JobStore, wake: Callable[[], None]) -> None:
        """Look at nothing yet; ``wake`` is called at each change in the inbox, from other threads."""
        self._store = store
        self._inbox = Inbox(config.inbox, config.settle_seconds)
        self._watch = Watch(wake)
        self._mount = ""  # where the inbox's file system is mounted
        self._adopt_again = 0.0  # when what is half taken in is looked at
        self._left: tuple[Problem, ...] = ()  # of what is half taken in, or not ours
        self._clear_held = 0.0
        self._waiting: tuple[Waiting, ...] = ()
        self._told: str | None = None

    def adopt_again(self) -> None:
        """Have the next round take up what is half taken in."""
        self._adopt_again = 0.0

    def has_moved(self, config: Config) -> bool:
        """Say whether another folder stands at the inbox's path than the one that is watched; quick."""
        try:
            return not self._watch.is_on(config.inbox)
        except OSError:  # gone: the next round says so
            return self._told is None

    def end(self) -> None:
        """Stop watching."""
        self._watch.end()

    def look(self, config: Config, stopping: Callable[[], bool]) -> Looked:
        """Go through the inbox once, and take of thousands of files as many as are worth a scan.

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
            # Unmounted or without rights: say so, and touch nothing; what is queued goes on.
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
        """See that the inbox is the one it was, and watch it."""
        mount, kind = mount_of(config.inbox)
        if len(mount) < len(self._mount):
            words = f"lay on the disk or share at {self._mount}, which is not mounted now: mount it again"
            raise FolderError(config.inbox, words)
        if not self._watch.is_on(config.inbox):
            obstacle = self._watch.turn_to(config.inbox)
            log.info("watching %s (%s)", config.inbox, kind or "unknown")
            if obstacle is not None:
                log.warning("%s; until then it is looked at every %.0f s", obstacle, poll_seconds(config))
        self._mount = mount

    def _adopt(self, config: Config) -> None:
        """Take up what was half taken in; whole work folders become jobs also while the inbox is away."""
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
        if time.monotonic() >= self._clear_held:  # what could not be moved is tried again now and then
            self._inbox.held.clear()
            self._clear_held = time.monotonic() + RETRY_SECONDS
        return self._inbox.scan(self._store.taken_as)

    def _take(self, scan: Scan, scanned: float, config: Config, stopping: Callable[[], bool]) -> bool:
        """Take what is ready; says whether some of it is left. ``scanned``: what the scan has taken."""
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
        """Keep from taking a group until everything that is held is tried again."""
        self._inbox.held[group.folder, group.name] = reason
        log.warning("%s", reason)

    def _unreadable(self, config: Config, error: OSError) -> Looked:
        problem = trouble(config.inbox, error)
        if isinstance(error, FolderError):
            problem = Problem("inbox", f"the inbox {error}; what is queued goes on")
        if problem.text != self._told:
            log.warning("%s", problem.text)
        self._told = problem.text
        again = min(poll_seconds(config), RETRY_SECONDS)
        return Looked(self._waiting, (*self._left, problem), idle=True, again=again)


def silent_inbox(config: Config, seconds: float) -> tuple[Problem, ...]:
    """Say so if the inbox has not answered for long."""
    if seconds < SILENT_SECONDS:
        return ()
    words = f"the inbox {config.inbox} has not answered for {seconds:.0f} s"
    return (Problem("inbox", f"{words}: look after its disk or its connection"),)
