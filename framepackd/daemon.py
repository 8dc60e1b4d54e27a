"""The daemon: opens everything, then repeats one loop until it is told to stop.

This process watches, records and delivers; a worker process does what needs torch.
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
from itertools import chain
from typing import Any

from framepack_core import __version__
from framepackd import folders, rights
from framepackd.control import commands, socket
from framepackd.control.nodes import NO_NODES
from framepackd.control.requests import Requests
from framepackd.control.signals import hearing_signals
from framepackd.control.status import in_one_line, snapshot
from framepackd.delivery.deliveries import Deliveries
from framepackd.delivery.results_page import ResultsPage
from framepackd.intake import take, take_back
from framepackd.intake.scanning import Scanning
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
from framepackd.supervisor.cards import Cards
from framepackd.supervisor.readiness import missing_model, missing_room
from framepackd.supervisor.supervisor import ROUND_SECONDS, STOPPING

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0  # a stop waits so long for disks
STOPPING_ROUND_SECONDS = 0.5  # between two rounds while the daemon stops
LONGEST_SECONDS = 3600.0  # between two rounds
STORE_RETRY_SECONDS = 5.0  # before the database is tried again


def run(config: Config, *, once: bool = False, load_again: Callable[[], Config] | None = None) -> int:
    """Run the daemon in the foreground; returns the exit code. ``load_again`` reads the config on SIGHUP.

    Raises:
        AlreadyRunningError: another daemon runs on this state folder.
        StoreError: the database cannot be used.
        OSError: a folder cannot be made or read.
    """
    rights.make_folders(config)
    lock = control_lock.Lock(config.state_dir, waiting=_report_waiting)
    try:
        folders.make_new(config)
        with ExitStack() as stack:
            store = JobStore(config.database)
            stack.callback(store.close)
            log.info(
                "framepackd %s: model %s, device %s; inbox %s, outbox %s; configuration %s",
                *(__version__, config.model, _devices(config), config.inbox, config.outbox),
                config.file or "none: the defaults",
            )
            problems = rights.put_right(config)  # of the database's files too
            daemon = Daemon(
                config, store, once=once, load_again=load_again or (lambda: config), problems=problems
            )
            stack.enter_context(hearing_signals(daemon.stop, daemon.reload))
            stack.enter_context(socket.serve(config.state_dir, daemon.answer))
            return daemon.run()
    finally:
        lock.release()


def _devices(config: Config) -> str:
    """Name what is to compute: devices of this machine, and other machines."""
    nodes = config.cluster.nodes
    return ", ".join((*config.gpu.devices, *(("all nodes",) if nodes == "all" else nodes)))


def _report_waiting(pid: int) -> None:
    """Report to systemd, again and again, that the daemon before this one cannot end yet."""
    waited = f"waiting for pid {pid}, the daemon before this one, to end: its disk does not answer"
    systemd.notify(f"EXTEND_TIMEOUT_USEC={systemd.STOP_USEC}", "WATCHDOG=1", f"STATUS={waited}")


class Daemon:
    """The loop: listen to the worker, scan the inbox, deliver what is decided, start the next job."""

    def __init__(
        self,
        config: Config,
        store: JobStore,
        *,
        load_again: Callable[[], Config],
        once: bool = False,
        problems: Sequence[Problem] = (),
    ) -> None:
        """Take what is opened already, and ``problems`` that the start could not put right.

        ``once`` ends when nothing is left to do.
        """
        self.config = config
        self.store = store
        self.paused: str | None = None  # since when and by whom, as recorded
        self.stopping = False
        self._stop_reported = False
        self._once = once
        self._load_again = load_again
        self._problems = problems
        self._since = utc_now()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._store_trouble: str | None = None  # why the database cannot be used just now
        self._store_again = 0.0  # when it is tried again
        self._reload_asked = False
        self._stop_by = math.inf  # when a stop waits no longer for disks

        self.requests = Requests(self.wake)
        self.scanning = Scanning(config, store, self.wake, lambda: self.stopping)
        self.deliveries = Deliveries(config, store, self.wake, self._gives_up_copies, take_back.bring_back)
        # With --once nobody waits for a model: the job fails, and says what to do.
        obstacles = (missing_room,) if once else (missing_model, missing_room)
        self.cards = Cards(config, store, obstacles, self.wake)
        self._reporter = Reporter(lambda: in_one_line(self.snapshot(), datetime.now(UTC)))
        self._results_page = ResultsPage(lambda: folders.trouble("outbox", self.config))
        self._metrics = Metrics(config, store, self.snapshot)

    # called from other threads and from signal handlers

    def wake(self) -> None:
        """Have the loop begin its next round now."""
        with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
            os.write(self._wake_write, b"w")

    def stop(self) -> None:
        """Stop at the next step; at the second call, at once."""
        if self.stopping:
            self.cards.kill()
        else:
            self._stop_by = time.monotonic() + STOP_SECONDS
        self.stopping = True
        self.wake()

    def _gives_up_copies(self) -> bool:
        """Say whether a copy ends unfinished, for the next daemon to resume."""
        return self.stopping and time.monotonic() > self._stop_by - STOP_SECONDS / 2

    def reload(self) -> None:
        """Read the configuration again in the next round."""
        self._reload_asked = True
        self.wake()

    def answer(self, request: Any) -> Any:
        """Answer another command; runs in a thread of its own."""
        if request.get("command") == "status":
            return self.snapshot()
        if request.get("command") == "show":
            job = self.store.find(str(request.get("job")))
            reasons = self.cards.passed_over.reasons
            return {"job": whole(job, self.config, self.deliveries.of(job), reasons) if job else None}
        if request.get("command") == "nodes":
            return self.cards.fleet.report() if self.cards.fleet else {"error": NO_NODES}
        if request.get("command") in commands.CHANGING:
            return self.requests.ask(request)
        return {"error": f"unknown command {request.get('command')!r}"}

    def snapshot(self) -> Report:
        """Give what ``status --json`` prints."""
        daemon: DaemonReport = {
            "state": "stopping" if self.stopping else "running",
            "pid": os.getpid(),
            "since": self._since,
            "model": self.config.model,
            "device": self.cards.names,
            "hardware": self.cards.hardware,
            "devices": self.cards.reports(),
            "paused": self.why_paused,
            "inbox": str(self.config.inbox),
            "outbox": str(self.config.outbox),
        }
        found = (self.scanning.problems, self.deliveries.problems, self.cards.problems)
        return snapshot(
            self.store,
            self.scanning.looked.waiting,
            daemon,
            chain(self._problems, *found),
            delivery=self.deliveries.of,
            passed_over=self.cards.passed_over.reasons,
            kinds=self.config.model_kinds(),
        )

    @property
    def why_paused(self) -> str | None:
        """Why no job is started; None if nothing is in the way."""
        return self._store_trouble or self.paused or self.cards.held

    # the loop

    def run(self) -> int:
        """Repeat rounds until stopped or, with ``once``, until all is done; returns the exit code."""
        take.clear_ended(self.config, self.store)
        self._adopt_leftovers()
        self.deliveries.look_for_leftovers()
        self._results_page.refresh(self.config)
        systemd.notify("READY=1")
        try:
            self.round()
            while not self.finished:
                self.sleep()
                self.round()
        finally:
            self.cards.end()
            self.scanning.end()
            self._results_page.close()
            self._metrics.round(ending=True)
        failed = self.scanning.failed or self.deliveries.failed
        if self._once and not self.stopping:
            if self.store.next_queued():
                failed = True
                log.error("jobs are left in the queue: %s", self.why_paused)
            self.scanning.looked.tell_what_waits()
        return 1 if self._once and failed else 0

    def _adopt_leftovers(self) -> None:
        """Resume what a daemon before this one, or this one, began and did not record to the end."""
        for job in self.store.recover(self.cards.running):
            log.warning("job %s: back in the queue: the daemon ended while it ran", job.id)
        self.scanning.adopt_leftovers()
        self.paused = self.store.paused()

    @property
    def finished(self) -> bool:
        """Whether the loop may end."""
        if self.cards.busy:
            return False
        if self.stopping:
            busy = self.scanning.busy or self.deliveries.busy
            return not busy or time.monotonic() > self._stop_by
        delivered = not self.deliveries.busy and self.deliveries.due > 0.0
        at_rest = delivered and self.scanning.idle and self.requests.empty()
        return self._once and at_rest and bool(self.why_paused or not self.store.next_queued())

    def round(self) -> None:
        """Do what is due and report; while the database cannot be used, only report."""
        if time.monotonic() >= self._store_again or self.stopping:
            self._advance_or_wait()
        with contextlib.suppress(StoreUnavailableError):  # then systemd hears only that the loop runs
            self._reporter.round(stopping=self.stopping)
        self._metrics.round()

    def _advance_or_wait(self) -> None:
        """Advance, unless the database cannot be used: then the next rounds try again."""
        try:
            if self._store_trouble is not None:
                self._adopt_leftovers()
            self.advance(time.monotonic())
        except StoreUnavailableError as error:
            if self.stopping or self._once:
                raise
            # Nothing is lost: the worker's message, the files and the request's sender are still there.
            trouble = f"{error}: tried again every {STORE_RETRY_SECONDS:.0f} s"
            if trouble != self._store_trouble:
                log.error("%s", trouble)  # noqa: TRY400 - the text says all
            self._store_trouble = trouble
            self._store_again = time.monotonic() + STORE_RETRY_SECONDS
        else:
            if self._store_trouble is not None:
                log.warning("%s can be used again", self.config.database)
                self._store_trouble = None

    def advance(self, now: float) -> None:
        """Have each part do what is due at ``now``, on the monotonic clock.

        Raises:
            StoreError: the database cannot be used.
        """
        self.cards.listen()
        if self._reload_asked:
            self._reload()
        self._answer_requests()
        self._steer(now)  # before the rest, for the device waits; deliveries can wait
        self.scanning.round(now, hurry=self.cards.busy)
        self.cards.listen()  # another device may have become free meanwhile; what has ended is delivered now
        self._steer(now)
        if self.deliveries.round(hurry=self.cards.busy, spared=self.cards.helped):
            self.cards.try_now()  # there may be room now
            self._results_page.refresh(self.config)
        self._steer(now)
        self.cards.tell_next()

    def _steer(self, now: float) -> None:
        """Have the workers leave their jobs if they must, or start the next ones."""
        if self.stopping:
            if not self._stop_reported:
                self._stop_reported = True
                then = ": each running job leaves at its next step, and resumes when the daemon starts again"
                log.info("stopping%s", then if self.cards.busy else "")
            self.cards.leave(now, STOPPING)
        elif self.paused is not None:
            self.cards.leave(now, "paused")
            self.cards.end_idle()
        elif self.cards.steer(now):
            self.scanning.wake()  # a job failed at once: the next round starts another

    def _answer_requests(self) -> None:
        queue = commands.Queue(self.config, self.store, self.cards, self.deliveries)

        def perform(request: dict[str, Any]) -> commands.Answer:
            answer = commands.perform(request, queue)
            self.paused = self.store.paused()  # before its sender hears of it and asks for the status
            return answer

        while not self.requests.empty():
            self.requests.answer_next(perform)
            self.cards.try_now()

    def _reload(self) -> None:
        """Use what can change while running of the configuration as it is now."""
        self._reload_asked = False
        systemd.reloading()
        try:
            config, taken, fixed = changed(self.config, self._load_again())
        except ConfigError as error:
            log.error("the configuration stays as it was: %s", error)  # noqa: TRY400 - the text says all
        else:
            self.reconfigure(config)
            self.retry_now()
            log.info("configuration read again: %s", f"new {', '.join(taken)}" if taken else "nothing new")
            if fixed:
                log.warning("%s: new in the configuration, but holds only after a restart", ", ".join(fixed))
        systemd.notify("READY=1")

    def reconfigure(self, config: Config) -> None:
        """Have all parts use another configuration from now on."""
        self.config = self.scanning.config = self.deliveries.config = config
        self._metrics.config = config
        self.cards.reconfigure(config)
        self._results_page.refresh(config)

    def retry_now(self) -> None:
        """Have the next round scan the inbox, and try again what waits for its time."""
        self._store_again = self.scanning.next_scan = 0.0
        self.cards.try_now()

    @property
    def patience(self) -> float:
        """How many seconds the loop may sleep before its next round."""
        due = self._store_again
        if self._store_trouble is None:
            due = min(self.scanning.due, self.deliveries.due, self.cards.due)
        patience = max(due - time.monotonic(), 0.0)
        if self.cards.busy:
            patience = min(patience, ROUND_SECONDS)
        if self.stopping:
            patience = STOPPING_ROUND_SECONDS
        return min(patience, self._reporter.patience, self._metrics.patience, LONGEST_SECONDS)

    def sleep(self) -> None:
        """Sleep until something happens or is due."""
        # While the database cannot be used, the worker's messages wait: they could not be recorded.
        sources = self.cards.sources if self._store_trouble is None else []
        multiprocessing.connection.wait([self._wake_read, *sources], self.patience)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_read, 4096):
                pass
