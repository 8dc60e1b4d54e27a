"""The daemon: opens everything, then goes round one loop until it is told to stop.

Its process watches, records and delivers; a worker process beside it does what needs torch.
"""

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from framepack_core.request import GenerationSettings, Request
from framepackd import control, delivery, intake, worker
from framepackd.config import Config, filesystem_type, poll_seconds
from framepackd.inbox import Inbox, Scan, Waiting
from framepackd.jobs import Job, JobStore, State, utc_now
from framepackd.status import snapshot
from framepackd.watching import watching

log = logging.getLogger(__name__)

SCAN_SECONDS = 0.25  # at most this often, however many events arrive
STOP_SECONDS = 90.0  # for the step or decode in progress; then the worker is ended
INTAKE_SECONDS = 0.5  # of taking in, before the loop goes round again
RETRY_SECONDS = 30.0  # before something that failed for want of space or rights is tried again


def run(config: Config, *, once: bool = False) -> int:
    """Run the daemon in the foreground; returns the exit code.

    Raises:
        AlreadyRunningError: another daemon runs on this state folder.
        StoreError: the database cannot be used.
        OSError: a folder cannot be made or read.
    """
    for folder in (*config.folders.values(), config.jobs_dir):
        folder.mkdir(parents=True, exist_ok=True)
    lock = control.Lock(config.state_dir)
    try:
        with ExitStack() as stack:
            daemon = Daemon(config, JobStore(config.database), once=once)
            stack.enter_context(_stopping_on_signals(daemon))
            stack.enter_context(control.serve(config.state_dir, daemon.answer))
            stack.enter_context(watching(config, daemon.wake))
            return daemon.run()
    finally:
        lock.release()


class Daemon:
    """The loop: look at the inbox, deliver what is decided, listen to the worker, start the next job."""

    def __init__(self, config: Config, store: JobStore, *, once: bool = False) -> None:
        """Take what is opened already; ``once`` ends when nothing is left to do."""
        self._config = config
        self._store = store
        self._once = once
        self._inbox = Inbox(config.inbox, config.settle_seconds, prompted="prompt" in config.defaults)
        self._poll_seconds = poll_seconds(config)
        self._worker: worker.Handle | None = None
        self._device = config.gpu.device  # until the worker tells what "auto" has become
        self._waiting: tuple[Waiting, ...] = ()
        self._since = utc_now()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._next_scan = 0.0
        self._changed = True  # something happened in the inbox since the last scan
        self._retry_delivery: dict[str, float] = {}  # job id -> when to try again
        self._clear_held = 0.0
        self._idle = False  # the last scan found nothing to take or to wait for
        self._failed = False
        self.stopping = False

    def wake(self) -> None:
        """Have the loop look at the inbox soon; called from other threads and signal handlers."""
        self._changed = True
        with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
            os.write(self._wake_write, b"w")

    def stop(self) -> None:
        """Stop at the next step; told a second time, at once."""
        if self.stopping and self._worker is not None:
            self._worker.process.kill()
        self.stopping = True
        self.wake()

    def answer(self, request: Any) -> Any:
        """Answer another command; runs in a thread of its own."""
        if request.get("command") == "status":
            return snapshot(self._store, self._waiting, self._describe())
        if request.get("command") == "show":
            job = self._store.find(str(request.get("job")))
            return {"job": job.record() if job else None}
        return {"error": f"unknown command {request.get('command')!r}"}

    def _describe(self) -> dict[str, Any]:
        return {
            "state": "stopping" if self.stopping else "running",
            "pid": os.getpid(),
            "since": self._since,
            "model": self._config.model,
            "device": self._device,
            "paused": None,
        }

    # the loop

    def run(self) -> int:
        """Go round until stopped, or, once, until all is done; returns the exit code."""
        self._recover()
        _notify("READY=1")
        log.info("watching %s (%s)", self._config.inbox, filesystem_type(self._config.inbox) or "unknown")
        try:
            self._round()
            while not self._finished():
                self._wait()
                self._round()
        finally:
            _notify("STOPPING=1")
            self._end_worker()
        return 1 if self._once and self._failed else 0

    def _recover(self) -> None:
        """Take up what the daemon before this one left."""
        for job in self._store.recover():
            log.warning("job %s: back in the queue: the daemon ended while it ran", job.id)
        intake.adopt_leftovers(self._config, self._store)

    def _finished(self) -> bool:
        busy = self._worker is not None and self._worker.job is not None
        if self.stopping:
            return not busy
        return self._once and self._idle and not busy and not self._store.has_queued()

    def _round(self) -> None:
        self._listen()
        now = time.monotonic()
        if not self.stopping and now >= self._next_scan:
            self._look(now)
        self._deliver(now)
        if not self.stopping:
            self._start_next()
        else:
            self._press_worker(now)

    def _wait(self) -> None:
        """Sleep until something happens or the next scan is due."""
        # A change is looked at soon, but not for every one of a thousand events.
        if self._changed:
            self._next_scan = min(self._next_scan, time.monotonic() + SCAN_SECONDS)
        timeout = max(min([self._next_scan, *self._retry_delivery.values()]) - time.monotonic(), 0.0)
        if self.stopping:
            timeout = 0.5
        sources: list[Any] = [self._wake_read]
        if self._worker is not None:
            sources += [self._worker.connection, self._worker.process.sentinel]
        multiprocessing.connection.wait(sources, timeout)
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
        for group in scan.ready:
            if self.stopping or time.monotonic() - now > INTAKE_SECONDS:
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
            try:
                delivery.deliver(job, self._config, self._store)
            except OSError as error:
                self._retry_delivery[job.id] = now + RETRY_SECONDS
                self._failed = True  # for --once, which does not wait for better times
                log.error(  # noqa: TRY400 - the text says all; it is tried again
                    "job %s: cannot be delivered (%s: %s): trying again in %.0f s",
                    job.id,
                    error.strerror,
                    error.filename2 or error.filename,
                    RETRY_SECONDS,
                )
            else:
                assert job.delivery is not None
                self._failed |= job.delivery["state"] == State.FAILED

    # the worker

    def _start_next(self) -> None:
        if self._worker is not None and self._worker.job is not None:
            return
        job = self._store.claim()
        if job is None:
            return
        try:
            work = self._work(job)
        except (KeyError, ValueError) as error:  # taken in under another config or version
            self._fail(job, f"its settings do not fit the config any more ({error}): drop its files again")
            return
        if self._worker is None:
            self._worker = worker.start()
        self._worker.job = job
        log.info("job %s: %s started (%s)", job.id, job.path, work.spec.name)
        with contextlib.suppress(OSError):  # it died just now: noticed when it is listened to
            self._worker.connection.send(work)

    def _work(self, job: Job) -> worker.Work:
        folder = self._config.jobs_dir / job.id
        inputs = folder / intake.INPUTS
        generation = {key: job.settings[key] for key in GenerationSettings.model_fields}
        return worker.Work(
            job_id=job.id,
            request=Request(
                image=inputs / job.inputs["image"]["file"],
                end_image=inputs / job.inputs["end"]["file"] if "end" in job.inputs else None,
                prompt=job.settings["prompt"],
                seed=job.settings["seed"],
                **generation,
            ),
            spec=self._config.spec(job.settings["model"]),
            result=folder / delivery.RESULT,
            frames=job.frames,
            crf=job.settings["crf"],
            save_section_frames=job.settings["save_section_frames"],
            device=self._config.gpu.device,
            dtype=self._config.gpu.dtype,
        )

    def _listen(self) -> None:
        """Take in what the worker says, and notice when it is gone."""
        running = self._worker
        if running is None:
            return
        try:
            while running.connection.poll():
                self._hear(running, running.connection.recv())
        except (EOFError, OSError):  # gone, perhaps in the middle of a word
            running.process.join()
        if not running.process.is_alive():
            self._bury(running)

    def _hear(self, running: worker.Handle, message: worker.Message) -> None:
        job = running.job
        assert job is not None, "the worker speaks only about its job"
        match message:
            case worker.Ready():
                self._device = message.device
                return
            case worker.StepDone():
                self._store.step(job.id, section=message.section, step=message.step, seconds=message.seconds)
                _notify(f"STATUS={job.path}: section {message.section}/{job.sections}, step {message.step}")
                return
            case worker.SectionDecoded():
                self._store.decoded(job.id, seconds=message.seconds)
                return
            case worker.Finished():
                spec = self._config.spec(job.settings["model"])
                sources = ("transformer", "base", "image_encoder")
                self._store.decide(
                    job.id,
                    State.DONE,
                    timings=message.timings,
                    versions=message.versions,
                    device=self._device,
                    model_sources={name: str(getattr(spec, name)) for name in sources},
                )
            case worker.Stopped():
                self._store.requeue(job.id, "stopped with the daemon")
                log.info("job %s: back in the queue: the daemon stops", job.id)
            case worker.Failed(retry=False):
                self._fail(job, message.error)
            case worker.Failed():
                self._count_attempt(job, message.error)
        running.job = None
        running.stop_sent = None

    def _bury(self, running: worker.Handle) -> None:
        """The worker is dead; so may be its attempt at a job."""
        self._worker = None
        running.connection.close()
        job = running.job
        if job is None:
            log.warning("the worker ended while idle: %s", running.manner_of_death())
        elif running.stop_sent is not None or self.stopping:
            self._store.requeue(job.id, "stopped with the daemon")
        else:
            self._count_attempt(job, f"the worker {running.manner_of_death()}")

    def _count_attempt(self, job: Job, error: str) -> None:
        attempts = self._store.count_attempt(job.id, error)
        log.warning("job %s: attempt %d of %d: %s", job.id, attempts, self._config.max_attempts, error)
        if attempts >= self._config.max_attempts:
            self._fail(job, f"gave up after {attempts} attempts, the last: {error}")

    def _fail(self, job: Job, error: str) -> None:
        log.error("job %s: failed: %s", job.id, error)
        self._store.decide(job.id, State.FAILED, error=error)

    def _press_worker(self, now: float) -> None:
        """Ask the worker to leave its job, and end it if it does not."""
        running = self._worker
        if running is None or running.job is None:
            return
        if running.stop_sent is None:
            running.stop_sent = now
            with contextlib.suppress(OSError):
                running.connection.send(None)
        elif now - running.stop_sent > STOP_SECONDS:
            running.process.kill()

    def _end_worker(self) -> None:
        if self._worker is None:
            return
        self._worker.connection.close()  # idle, it reads the end and returns
        self._worker.process.join(5)
        if self._worker.process.is_alive():
            self._worker.process.kill()
            self._worker.process.join()


@contextmanager
def _stopping_on_signals(daemon: Daemon) -> Iterator[None]:
    """Have SIGTERM and SIGINT set the flag the loop looks at."""
    before = {
        number: signal.signal(number, lambda *_: daemon.stop()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _notify(message: str) -> None:
    """Tell systemd, if it listens (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier, contextlib.suppress(OSError):
        notifier.sendto(message.encode(), f"\0{address[1:]}" if address.startswith("@") else address)
