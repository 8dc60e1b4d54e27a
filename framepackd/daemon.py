"""The daemon: opens everything, then goes round one loop until it is told to stop.

Its process watches, records and delivers; a worker process beside it does what needs torch.
"""

import contextlib
import logging
import multiprocessing.connection
import os
import queue
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

from framepackd import commands, control, intake, notify, rights
from framepackd.config import Config, ConfigError, changed, filesystem_type, poll_seconds
from framepackd.database import State, StoreError, StoreUnavailableError, utc_now
from framepackd.inbox import Inbox, Scan, Waiting
from framepackd.jobs import JobStore
from framepackd.metrics import Metrics
from framepackd.notify import Reporter
from framepackd.problems import Problem
from framepackd.readiness import missing_model, missing_room
from framepackd.results_page import ResultsPage
from framepackd.runner import CANCELLING, ROUND_SECONDS, STOPPING, Runner
from framepackd.signals import hearing_signals
from framepackd.status import in_one_line, snapshot, whole
from framepackd.watching import watching

log = logging.getLogger(__name__)

SCAN_SECONDS = 0.25  # at most this often, however many events arrive
INTAKE_SECONDS = 0.5  # of taking in, before the loop goes round again
RETRY_SECONDS = 30.0  # before something that failed for want of space or rights is tried again
STORE_RETRY_SECONDS = 5.0  # before the database is tried again
REQUEST_SECONDS = 8.0  # for the loop to come to a request; who asked waits longer


def run(config: Config, *, once: bool = False, load_again: Callable[[], Config] | None = None) -> int:
    """Run the daemon in the foreground; returns the exit code. ``load_again`` reads the config on SIGHUP.

    Raises:
        AlreadyRunningError: another daemon runs on this state folder.
        StoreError: the database cannot be used.
        OSError: a folder cannot be made or read.
    """
    rights.make_folders(config)
    lock = control.Lock(config.state_dir)
    try:
        with ExitStack() as stack:
            store = JobStore(config.database)
            problems = rights.put_right(config)  # of the database's files too
            daemon = Daemon(config, store, once=once, load_again=load_again or (lambda: config))
            daemon.tell(problems)
            stack.enter_context(hearing_signals(daemon.stop, daemon.reload))
            stack.enter_context(control.serve(config.state_dir, daemon.answer))
            stack.enter_context(watching(config, daemon.wake))
            return daemon.run()
    finally:
        lock.release()


class Daemon:
    """The loop: look at the inbox, deliver what is decided, listen to the worker, start the next job."""

    def __init__(
        self, config: Config, store: JobStore, *, load_again: Callable[[], Config], once: bool = False
    ) -> None:
        """Take what is opened already; ``once`` ends when nothing is left to do."""
        self._config = config
        self._store = store
        self._once = once
        self._inbox = Inbox(config.inbox, config.settle_seconds, prompted="prompt" in config.defaults)
        self._poll_seconds = poll_seconds(config)
        self._load_again = load_again
        self._runner = Runner(config, store)
        self._reporter = Reporter(lambda: in_one_line(self._snapshot(), datetime.now(UTC)))
        self._results_page = ResultsPage()
        self._metrics = Metrics(lambda: self._config, store, self._snapshot)
        self._waiting: tuple[Waiting, ...] = ()
        self._problems: tuple[Problem, ...] = ()
        self._since = utc_now()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._next_scan = 0.0
        self._changed = True  # something happened in the inbox since the last scan
        self._retry_delivery: dict[str, float] = {}  # job id -> when to try again
        self._clear_held = 0.0
        self._requests: queue.SimpleQueue[tuple[dict[str, Any], Future[Any]]] = queue.SimpleQueue()
        # With --once nobody waits for a model: the job fails, and says what to do.
        self._obstacles = (missing_room,) if once else (missing_model, missing_room)
        self._paused: str | None = None  # since when and by whom, as recorded
        self._held: str | None = None  # why the next job is not started, and when to look again
        self._look_again = 0.0
        self._store_trouble: str | None = None  # why the database cannot be used just now, and until when
        self._store_again = 0.0
        self._idle = False  # the last scan found nothing to take or to wait for
        self._failed = False
        self._reload_asked = False
        self.stopping = False

    def tell(self, problems: Iterable[Problem]) -> None:
        """Have the status tell of problems as well, as long as this daemon runs."""
        self._problems = (*self._problems, *problems)

    def wake(self) -> None:
        """Have the loop look at the inbox soon; called from other threads and signal handlers."""
        self._changed = True
        with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
            os.write(self._wake_write, b"w")

    def stop(self) -> None:
        """Stop at the next step; told a second time, at once."""
        if self.stopping:
            self._runner.kill()
        self.stopping = True
        self.wake()

    def reload(self) -> None:
        """Read the configuration again in the next round."""
        self._reload_asked = True
        self.wake()

    def answer(self, request: Any) -> Any:
        """Answer another command; runs in a thread of its own."""
        if request.get("command") == "status":
            return self._snapshot()
        if request.get("command") == "show":
            job = self._store.find(str(request.get("job")))
            return {"job": whole(job, self._config) if job else None}
        if request.get("command") in commands.CHANGING:
            return self._have_done(request)
        return {"error": f"unknown command {request.get('command')!r}"}

    def _have_done(self, request: dict[str, Any]) -> Any:
        """Hand a request that changes something to the loop, which alone does so, and wait for its answer."""
        answer: Future[Any] = Future()
        self._requests.put((request, answer))
        self.wake()
        try:
            return answer.result(REQUEST_SECONDS)
        except TimeoutError:
            then = "nothing was changed: try again" if answer.cancel() else "it is still at it"
            return {"error": f"it is busy: {then}"}

    def _snapshot(self) -> dict[str, Any]:
        return snapshot(self._store, self._waiting, self._describe(), self._problems)

    def _describe(self) -> dict[str, Any]:
        return {
            "state": "stopping" if self.stopping else "running",
            "pid": os.getpid(),
            "since": self._since,
            "model": self._config.model,
            "device": self._runner.device,
            "paused": self._store_trouble or self._paused or self._held,
        }

    # the loop

    def run(self) -> int:
        """Go round until stopped, or, once, until all is done; returns the exit code."""
        self._take_up_leftovers()
        self._results_page.refresh(self._config)
        notify.notify("READY=1")
        log.info("watching %s (%s)", self._config.inbox, filesystem_type(self._config.inbox) or "unknown")
        try:
            self._round()
            while not self._finished():
                self._wait()
                self._round()
        finally:
            self._runner.end_worker()
            self._results_page.close()
            self._metrics.round(ending=True)
        if self._once and not self.stopping and self._store.next_queued():
            self._failed = True
            log.error("jobs are left in the queue: %s", self._describe()["paused"])
        return 1 if self._once and self._failed else 0

    def _take_up_leftovers(self) -> None:
        """Take up what was begun and not recorded to the end, by a daemon before this one or by this one."""
        if not self._runner.busy:
            for job in self._store.recover():
                log.warning("job %s: back in the queue: the daemon ended while it ran", job.id)
        try:
            intake.adopt_leftovers(self._config, self._store)
        except OSError as error:
            log.error("what lies in %s: %s: looked at again at the next start", self._config.jobs_dir, error)  # noqa: TRY400 - says all
        self._paused = self._store.paused()

    def _finished(self) -> bool:
        if self._runner.busy:
            return False
        stuck = self._paused or self._held
        return self.stopping or (self._once and self._idle and bool(stuck or not self._store.next_queued()))

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
        if not self.stopping and now >= self._next_scan:
            self._look(now)
        self._deliver(now)
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
        while not self._requests.empty():
            request, answer = self._requests.get()
            if not answer.set_running_or_notify_cancel():
                continue  # nobody waits for it any more
            try:
                answer.set_result(commands.perform(request, self._config, self._store, self._runner))
            except Exception as error:
                answer.set_exception(error)
                if isinstance(error, StoreError):
                    raise
                log.exception("%s could not be done", request.get("command"))
            self._paused = self._store.paused()
            self._look_again = 0.0

    def _start_next(self, now: float) -> None:
        """Start the next job, unless something it needs is missing."""
        job = self._store.next_queued()
        if job is None or now < self._look_again:
            self._held = self._held if job else None
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
            self._look_again = now + RETRY_SECONDS
        self._held = held

    def _reload(self) -> None:
        """Take what can change while running from the configuration as it is now."""
        self._reload_asked = False
        notify.reloading()
        try:
            self._config, taken, fixed = changed(self._config, self._load_again())
        except ConfigError as error:
            log.error("the configuration stays as it was: %s", error)  # noqa: TRY400 - the text says all
        else:
            self._runner.reconfigure(self._config)
            self._poll_seconds = poll_seconds(self._config)
            self._inbox.settle_seconds = self._config.settle_seconds
            self._inbox.prompted = "prompt" in self._config.defaults
            self._look_again = 0.0  # what the queue waits for may be configured now
            self._results_page.refresh(self._config)
            log.info("configuration read again: %s", f"new {', '.join(taken)}" if taken else "nothing new")
            if fixed:
                log.warning("%s: new in the configuration, but holds only after a restart", ", ".join(fixed))
        notify.notify("READY=1")

    def _wait(self) -> None:
        """Sleep until something happens or the next scan is due."""
        # A change is looked at soon, but not for every one of a thousand events.
        if self._changed:
            self._next_scan = min(self._next_scan, time.monotonic() + SCAN_SECONDS)
        due = [self._next_scan, self._runner.unload_at, *self._retry_delivery.values()]
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
        timeout = min(timeout, self._reporter.patience, self._metrics.patience)
        multiprocessing.connection.wait([self._wake_read, *sources], timeout)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_read, 4096):
                pass

    # the inbox

    def _look(self, now: float) -> None:
        """Scan the inbox and take what is ready."""
        self._changed = False
        if now >= self._clear_held:  # what could not be moved is tried again now and then
            self._inbox.held.clear()
            self._clear_held = now + RETRY_SECONDS
        try:
            scan = self._inbox.scan(self._missed_job)
        except OSError as error:
            # Unmounted or without rights: say so, and touch nothing; what is queued goes on.
            log.warning("inbox %s cannot be read: %s", self._config.inbox, error.strerror)
            scan = Scan((), self._waiting, unsettled=False)
            self._failed = True
        unfinished = False
        begun = time.monotonic()  # after the scan: of thousands of files that alone may take as long
        for group in scan.ready:
            if self.stopping or time.monotonic() - begun > INTAKE_SECONDS:
                unfinished = True  # the worker and signals want to be heard between
                break
            try:
                intake.take(group, self._config, self._store)
            except intake.ChangedError:
                unfinished = True
            except OSError as error:
                reason = (
                    f"{group.name} cannot be moved out of the inbox ({error.strerror}): check its permissions"
                )
                self._inbox.held[group.folder, group.name] = reason
                log.warning("%s", reason)
        self._waiting = scan.waiting
        self._idle = not scan.ready and not scan.unsettled
        pause = min(self._poll_seconds, max(self._config.settle_seconds / 4, SCAN_SECONDS))
        self._next_scan = now + (pause if scan.unsettled or scan.ready else self._poll_seconds)
        if unfinished:
            self._next_scan = now
        if self._inbox.held:
            self._next_scan = min(self._next_scan, self._clear_held)

    def _missed_job(self, folder: str, name: str) -> str | None:
        job = self._store.latest(folder, name)
        return job.id if job else None

    def _deliver(self, now: float) -> None:
        for job in self._store.undelivered():
            if now < self._retry_delivery.get(job.id, now):
                continue
            self._retry_delivery.pop(job.id, None)
            self._reporter.feed()  # each may be a copy to a slow disk
            fails = (job.delivery or {}).get("state") == State.FAILED
            try:
                commands.settle(job, self._config, self._store)
            except OSError as error:
                self._retry_delivery[job.id] = now + RETRY_SECONDS
                self._failed = True  # for --once, which does not wait for better times
                where = f"{error.strerror}: {error.filename2 or error.filename}"
                text = f"its files cannot be moved ({where}): trying again in {RETRY_SECONDS:.0f} s"
                log.error("job %s: %s", job.id, text)  # noqa: TRY400 - it says all
            else:
                self._failed |= fails
                self._look_again = 0.0  # there may be room now
                self._results_page.refresh(self._config)
