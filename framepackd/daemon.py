"""The daemon: opens everything, then goes round one loop until it is told to stop.

Its process watches, records and delivers; a worker process beside it does what needs torch.
"""

import contextlib
import logging
import math
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from typing import Any

from framepackd import folders, rights
from framepackd.apart import Apart, within
from framepackd.control import commands, socket
from framepackd.control.requests import Requests
from framepackd.control.signals import hearing_signals
from framepackd.control.status import in_one_line, snapshot
from framepackd.delivery.deliveries import PATIENCE_SECONDS, Deliveries
from framepackd.delivery.results_page import ResultsPage
from framepackd.intake import take, take_back
from framepackd.intake.rounds import RETRY_SECONDS, SCAN_SECONDS, Looked, Rounds, silent_inbox
from framepackd.jobs import lock as control_lock
from framepackd.jobs.database import StoreUnavailableError
from framepackd.jobs.described import whole
from framepackd.jobs.job import utc_now
from framepackd.jobs.report import DaemonReport, Report
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.reports import systemd
from framepackd.reports.prometheus import Metrics
from framepackd.reports.systemd import Reporter
from framepackd.settings.config import Config, ConfigError, changed
from framepackd.supervisor.readiness import missing_model, missing_room
from framepackd.supervisor.supervisor import CANCELLING, ROUND_SECONDS, STOPPING, Runner

log = logging.getLogger(__name__)

GLANCE_SECONDS = 5.0  # between two glances at whether the inbox is still the same folder
STOP_SECONDS = 10.0  # for disks, when the daemon is to stop; then it does not wait any more
LONGEST_SECONDS = 3600.0  # from round to round
STORE_RETRY_SECONDS = 5.0  # before the database is tried again


def run(config: Config, *, once: bool = False, load_again: Callable[[], Config] | None = None) -> int:
    """Run the daemon in the foreground; returns the exit code. ``load_again`` reads the config on SIGHUP.

    Raises:
        AlreadyRunningError: another daemon runs on this state folder.
        StoreError: the database cannot be used.
        OSError: a folder cannot be made or read.
    """
    rights.make_folders(config)
    lock = control_lock.Lock(config.state_dir, waiting=_say_that_it_waits)
    try:
        folders.make_new(config)
        with ExitStack() as stack:
            store = JobStore(config.database)
            problems = rights.put_right(config)  # of the database's files too
            daemon = Daemon(
                config, store, once=once, load_again=load_again or (lambda: config), problems=problems
            )
            stack.enter_context(hearing_signals(daemon.stop, daemon.reload))
            stack.enter_context(socket.serve(config.state_dir, daemon.answer))
            return daemon.run()
    finally:
        lock.release()


def _say_that_it_waits(pid: int) -> None:
    """Tell, again and again, that the daemon before this one cannot end yet."""
    waited = f"waiting for pid {pid}, the daemon before this one, to end: its disk does not answer"
    systemd.notify(f"EXTEND_TIMEOUT_USEC={systemd.STOP_USEC}", "WATCHDOG=1", f"STATUS={waited}")


class Daemon:
    """The loop: look at the inbox, deliver what is decided, listen to the worker, start the next job."""

    def __init__(
        self,
        config: Config,
        store: JobStore,
        *,
        load_again: Callable[[], Config],
        once: bool = False,
        problems: Sequence[Problem] = (),
    ) -> None:
        """Take what is opened already, and what the start could not put right.

        ``once`` ends when nothing is left to do.
        """
        self._config = config
        self._store = store
        self._once = once
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._rounds = Rounds(config, store, self.wake)
        self._at_inbox: Apart[Looked] = Apart("inbox", self._nudge)
        self._looked = Looked()
        self._problems = problems
        self._deliveries = Deliveries(config, store, self._nudge, self._is_to_stop, take_back.bring_back)
        self._load_again = load_again
        self._runner = Runner(config, store)
        self._reporter = Reporter(lambda: in_one_line(self._snapshot(), datetime.now(UTC)))
        self._results_page = ResultsPage(lambda: folders.trouble("outbox", self._config))
        self._metrics = Metrics(lambda: self._config, store, self._snapshot)
        self._since = utc_now()
        self._next_scan = 0.0
        self._next_glance = 0.0  # at whether the inbox is still the same folder
        self._changed = True  # something happened in the inbox since the last scan
        self._requests = Requests(self._nudge)
        # With --once nobody waits for a model: the job fails, and says what to do.
        self._obstacles = (missing_room,) if once else (missing_model, missing_room)
        self._paused: str | None = None  # since when and by whom, as recorded
        self._held: str | None = None  # why the next job is not started, and when to look again
        self._look_again = 0.0
        self._store_trouble: str | None = None  # why the database cannot be used just now, and until when
        self._store_again = 0.0
        self._failed = False
        self._reload_asked = False
        self._stop_by = math.inf  # when a stop waits no longer for disks
        self.stopping = False

    def wake(self) -> None:
        """Have the loop look at the inbox soon; called from other threads, once for each change in it."""
        if not self._changed:  # else it knows: what is taken in alone makes thousands of changes
            self._changed = True
            self._nudge()

    def _nudge(self) -> None:
        """Have the loop go round now."""
        with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
            os.write(self._wake_write, b"w")

    def stop(self) -> None:
        """Stop at the next step; told a second time, at once."""
        if self.stopping:
            self._runner.kill()
        else:
            self._stop_by = time.monotonic() + STOP_SECONDS
        self.stopping = True
        self._nudge()

    def _is_to_stop(self) -> bool:
        """Say whether a copy is to be left, to be gone on with by the next daemon."""
        return self.stopping and time.monotonic() > self._stop_by - STOP_SECONDS / 2

    def reload(self) -> None:
        """Read the configuration again in the next round."""
        self._reload_asked = True
        self._nudge()

    def answer(self, request: Any) -> Any:
        """Answer another command; runs in a thread of its own."""
        if request.get("command") == "status":
            return self._snapshot()
        if request.get("command") == "show":
            job = self._store.find(str(request.get("job")))
            reasons = self._runner.passed_over.reasons
            return {"job": whole(job, self._config, self._deliveries.of(job), reasons) if job else None}
        if request.get("command") in commands.CHANGING:
            return self._requests.ask(request)
        return {"error": f"unknown command {request.get('command')!r}"}

    def _snapshot(self) -> Report:
        looked = self._looked
        problems = (
            *self._problems,
            *looked.problems,
            *silent_inbox(self._config, self._at_inbox.seconds),
            *self._deliveries.problems,
            *self._runner.problems,
        )
        return snapshot(
            self._store,
            looked.waiting,
            self._describe(),
            problems,
            delivery=self._deliveries.of,
            passed_over=self._runner.passed_over.reasons,
        )

    def _describe(self) -> DaemonReport:
        return {
            "state": "stopping" if self.stopping else "running",
            "pid": os.getpid(),
            "since": self._since,
            "model": self._config.model,
            "device": self._runner.device,
            "hardware": self._runner.hardware,
            "paused": self._store_trouble or self._paused or self._held,
        }

    # the loop

    def run(self) -> int:
        """Go round until stopped, or, once, until all is done; returns the exit code."""
        take.clear_ended(self._config, self._store)
        self._take_up_leftovers()
        self._deliveries.look_for_leftovers()
        self._results_page.refresh(self._config)
        systemd.notify("READY=1")
        try:
            self._round()
            while not self._finished():
                self._wait()
                self._round()
        finally:
            self._runner.end_worker()
            if not self._at_inbox.busy:
                self._rounds.end()
            self._results_page.close()
            self._metrics.round(ending=True)
        if self._once and not self.stopping and self._store.next_queued():
            self._failed = True
            log.error("jobs are left in the queue: %s", self._describe()["paused"])
        if self._once and not self.stopping:
            self._looked.tell_what_waits()
        return 1 if self._once and self._failed else 0

    def _take_up_leftovers(self) -> None:
        """Take up what was begun and not recorded to the end, by a daemon before this one or by this one."""
        if not self._runner.busy:
            for job in self._store.recover():
                log.warning("job %s: back in the queue: the daemon ended while it ran", job.id)
        self._rounds.adopt_again()
        self._paused = self._store.paused()

    def _finished(self) -> bool:
        if self._runner.busy:
            return False
        if self.stopping:
            busy = self._at_inbox.busy or self._deliveries.busy
            return not busy or time.monotonic() > self._stop_by
        if (
            not self._requests.empty()
            or self._changed
            or self._at_inbox.busy
            or self._deliveries.busy
            or self._deliveries.due == 0.0
        ):
            return False
        stuck = self._paused or self._held
        return self._once and self._looked.idle and bool(stuck or not self._store.next_queued())

    def _round(self) -> None:
        """Go round once, unless the database could not be used a moment ago."""
        now = time.monotonic()
        if now >= self._store_again or self.stopping:
            self._try(now)
        with contextlib.suppress(StoreUnavailableError):  # then systemd hears no more than that all goes on
            self._reporter.round(stopping=self.stopping)
        self._metrics.round()

    def _try(self, now: float) -> None:
        try:
            if self._store_trouble is not None:
                self._take_up_leftovers()
            self._do(now)
        except StoreUnavailableError as error:
            if self.stopping or self._once:
                raise
            # What was not recorded is still at hand: the worker's message, the files, the request's sender.
            trouble = f"{error}: tried again every {STORE_RETRY_SECONDS:.0f} s"
            if trouble != self._store_trouble:
                log.error("%s", trouble)  # noqa: TRY400 - the text says all
            self._store_trouble = trouble
            self._store_again = time.monotonic() + STORE_RETRY_SECONDS
        else:
            if self._store_trouble is not None:
                log.warning("%s can be used again", self._config.database)
                self._store_trouble = None

    def _do(self, now: float) -> None:
        self._runner.listen()
        if self._reload_asked:
            self._reload()
        self._answer_requests()
        self._steer(now)  # first of all, for the device waits; what it leaves to be delivered can wait
        self._look(now)
        if self._deliveries.round():
            self._look_again = 0.0  # there may be room now
            self._results_page.refresh(self._config)
        self._failed |= self._deliveries.failed
        self._steer(now)

    def _steer(self, now: float) -> None:
        """Have the worker do what is to be done now."""
        if self.stopping:
            self._runner.leave(now, STOPPING)
        elif self._paused is not None:
            self._held = None
            self._runner.leave(now, "paused")
            if not self._runner.busy:
                self._runner.end_worker()
        elif self._runner.cancelling:
            self._runner.leave(now, CANCELLING)
        elif not self._runner.busy:
            self._start_next(now)

    def _answer_requests(self) -> None:
        queue = commands.Queue(self._config, self._store, self._runner, self._deliveries)
        while not self._requests.empty():
            self._requests.answer_next(lambda request: commands.perform(request, queue))
            self._paused = self._store.paused()
            self._look_again = 0.0

    def _start_next(self, now: float) -> None:
        """Start the next job, unless something it needs is missing."""
        job, passed_over = self._runner.next_job(), self._runner.why_passed_over
        if job is None:
            self._held = passed_over
            self._look_again = now + RETRY_SECONDS if passed_over else self._look_again
            return
        if now < self._look_again and self._held not in (None, passed_over):
            return
        held = self._runner.take_block()
        if job.cancel is None:  # else what exists is to be written, no more
            reasons = (obstacle(job, self._config) for obstacle in self._obstacles)
            held = held or next(filter(None, reasons), None)
        if held is None:
            try:
                self._runner.start(job)
                self._changed |= not self._runner.busy  # it failed at once: soon round again for the next one
            except OSError as error:  # no memory for a process, or too many of them
                held = f"the worker cannot be started: {error}"
        if held is not None:
            if held != self._held:
                log.warning("the queue waits: %s", held)
            self._look_again = now + self._runner.patience
        self._held = held

    def _reload(self) -> None:
        """Take what can change while running from the configuration as it is now."""
        self._reload_asked = False
        systemd.reloading()
        try:
            self._config, taken, fixed = changed(self._config, self._load_again())
        except ConfigError as error:
            log.error("the configuration stays as it was: %s", error)  # noqa: TRY400 - the text says all
        else:
            self._runner.reconfigure(self._config)
            self._deliveries.config = self._config
            self._next_scan = 0.0
            self._look_again = 0.0  # what the queue waits for may be configured now
            self._results_page.refresh(self._config)
            log.info("configuration read again: %s", f"new {', '.join(taken)}" if taken else "nothing new")
            if fixed:
                log.warning("%s: new in the configuration, but holds only after a restart", ", ".join(fixed))
        systemd.notify("READY=1")

    def _wait(self) -> None:
        """Sleep until something happens or the next scan is due."""
        # A change is looked at soon, but not for every one of a thousand events.
        if self._changed:
            self._next_scan = min(self._next_scan, time.monotonic() + SCAN_SECONDS)
        due = [self._runner.unload_at, self._deliveries.due]
        if not self._at_inbox.busy:  # else it wakes us
            due += [self._next_scan, self._next_glance]
        if self._held is not None:
            due.append(self._look_again)
        sources = self._runner.sources
        if self._store_trouble is not None:
            due, sources = [self._store_again], []  # what the worker says can wait: it cannot be recorded
        timeout = max(min(due) - time.monotonic(), 0.0)
        if self._runner.busy:
            timeout = min(timeout, ROUND_SECONDS)
        if self.stopping:
            timeout = 0.5
        timeout = min(timeout, self._reporter.patience, self._metrics.patience, LONGEST_SECONDS)
        multiprocessing.connection.wait([self._wake_read, *sources], timeout)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_read, 4096):
                pass

    def _look(self, now: float) -> None:
        """Have what is in the inbox looked at when that is due, and take in what was found."""
        if self._at_inbox.is_done():
            self._take_look()
        if self.stopping or self._at_inbox.busy or now < min(self._next_scan, self._next_glance):
            return
        self._next_glance = now + GLANCE_SECONDS
        if now < self._next_scan:
            glance = partial(self._rounds.has_moved, self._config)
            if not within(PATIENCE_SECONDS, "glance at the inbox", glance, otherwise=False):
                return
        self._changed = False
        self._at_inbox.begin(partial(self._rounds.look, self._config, lambda: self.stopping))
        if self._at_inbox.is_done(PATIENCE_SECONDS):
            self._take_look()

    def _take_look(self) -> None:
        self._looked = Looked(self._looked.waiting, self._looked.problems, again=RETRY_SECONDS)
        self._looked = self._at_inbox.take()
        self._failed |= any(problem.code in ("inbox", "intake") for problem in self._looked.problems)
        self._next_scan = time.monotonic() + self._looked.again
