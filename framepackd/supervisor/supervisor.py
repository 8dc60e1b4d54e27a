"""Runs jobs on the worker of a device, one at a time, and decides how each ends.

A job is done, tried again (at most ``max_attempts`` times) or failed.
"""

import contextlib
import logging
import math
import time
from multiprocessing.connection import Connection

from framepackd.jobs.job import Job, State
from framepackd.jobs.job_sql import CANCELLED
from framepackd.jobs.store import JobStore
from framepackd.settings.config import Config
from framepackd.supervisor import outcomes, process, progress
from framepackd.supervisor.device_faults import DeviceFaults
from framepackd.supervisor.helping import Helping
from framepackd.supervisor.passed_over import PassedOver
from framepackd.supervisor.work import work_of
from framepackd.worker import messages

log = logging.getLogger(__name__)

STOPPING, CANCELLING = "stopped with the daemon", "cancelled"  # why a worker leaves its job
STOP_SECONDS = 90.0  # for the step or decode in progress; then the worker is ended
LISTEN_SECONDS = 0.5  # at most, to a worker that sends faster than messages can be recorded
ROUND_SECONDS = 5.0  # at most, between two rounds of the loop while a job runs


class Supervisor:
    """The worker process of one device, the job that it computes, and the one whose video it writes."""

    def __init__(
        self,
        config: Config,
        store: JobStore,
        asked: str | None = None,
        passed_over: PassedOver | None = None,
    ) -> None:
        """Start nothing yet: the worker process starts with the first job.

        ``asked``: its name in the configuration, by default the first. Devices share ``passed_over``.
        """
        self.config = config
        self.asked = asked or config.gpu.devices[0]
        self._store = store
        self.worker: process.Handle | None = None
        self._last_round = time.monotonic()
        self._unheard: messages.Message | None = None  # received, not yet recorded
        self._why_left = STOPPING  # why the worker is to leave its job
        self._writes_what_exists = False  # the worker writes what exists and generates no more
        self.faults = DeviceFaults()
        self.passed_over = passed_over or PassedOver(store, config.gpu.move_after)
        self._not_ahead: set[str] = set()  # jobs that broke the device when they were encoded ahead
        self._written_alone: set[str] = set()  # jobs beside whose writing no other is computed
        self.device = self.asked  # until the worker reports what "auto" means here
        self.hardware: str | None = None
        self.away: str | None = None  # why nothing can run on it, of another machine
        self.lacking: str | None = None  # what that lacks for the jobs that wait
        self._gpu_used = store.gpu_used()
        self.helping = Helping(store)

    @property
    def job(self) -> Job | None:
        """The job that the device computes."""
        return None if self.worker is None else self.worker.job

    @property
    def jobs(self) -> list[Job]:
        """The jobs that run: the one that is computed, and the one whose video is written."""
        return [] if self.worker is None else self.worker.jobs

    @property
    def busy(self) -> bool:
        """Whether the worker does anything."""
        return self.worker is not None and self.worker.busy

    @property
    def free(self) -> bool:
        """Whether the device can begin a job."""
        computes = self.worker is not None and (self.worker.job or self.worker.helps)
        return not computes and not any(job.id in self._written_alone for job in self.jobs)

    @property
    def loaded(self) -> str | None:
        """The model that the worker has loaded, and keeps for its next job."""
        return None if self.worker is None else self.worker.loaded

    @property
    def unload_at(self) -> float:
        """When an idle worker is ended, on the monotonic clock; inf for never."""
        seconds = self.config.gpu.idle_unload_seconds
        if self.worker is None or self.worker.busy or not seconds:
            return math.inf
        return self.worker.idle_since + seconds

    @property
    def sources(self) -> list[Connection | int]:
        """What becomes readable when the worker has sent a message or died."""
        return [] if self.worker is None else [self.worker.connection, self.worker.process.sentinel]

    @property
    def cancelling(self) -> bool:
        """Whether the job that is computed was cancelled."""
        return self.job is not None and bool(self.job.cancel)

    def next_job(self, place: int = 0) -> Job | None:
        """Give the first job of the queue that can run on this device, or the one ``place`` behind it."""
        return self.passed_over.next_job(self.config, self, place)

    def start(self, job: Job) -> None:
        """Start a job of the queue; the device has to be free."""
        try:
            work = self.work_of(job)
        except (KeyError, ValueError) as error:  # its settings are of another config or version
            why = f"its settings do not fit the config any more ({error}): drop its files again"
            outcomes.fail(job, self._store, why)
            return
        if self.worker is None:
            self.worker = process.start(self.asked)
        self.worker.job = self._store.claim(job.id)  # last: a failure before it leaves the job in the queue
        if self.worker.job is None:  # cancelled meanwhile
            return
        self.worker.begin(work.spec.name)
        self._writes_what_exists = job.cancel is not None
        log.info("job %s: %s started (%s)", job.id, job.path, work.spec.name)
        with contextlib.suppress(OSError):  # it died just now: listen() notices
            self.worker.connection.send(work)

    def help(self, owner: process.Handle, job: Job) -> None:
        """Have an idle worker make clips of a chain that the ``owner`` computes."""
        try:
            work = self.work_of(job)
            if self.worker is None:
                self.worker = process.start(self.asked)
        except (KeyError, ValueError, OSError) as error:
            self.helping.refuse(job, str(error))
        else:
            self.helping.begin(self.worker, owner, work)

    def work_of(self, job: Job) -> messages.Work:
        """Describe a job for the worker.

        Raises:
            KeyError, ValueError: its settings do not fit the configuration any more.
        """
        may_be_ahead = job.id not in self._not_ahead
        return work_of(
            job,
            self.config,
            self._store,
            device=self.asked,
            elsewhere=self.passed_over.elsewhere(self),
            moves=self.passed_over.moves(job.id),
            gpu_used=self._gpu_used,
            may_be_ahead=may_be_ahead,
        )

    def listen(self, share: float = 1.0) -> None:
        """Record the worker's messages, for a share of a round; notice if it hangs, dies or idles."""
        running = self.worker
        if running is None:
            return
        until = time.monotonic() + LISTEN_SECONDS * share
        while self._unheard is not None or self._receive(running):
            self._hear(running, self._unheard)
            sampled = isinstance(self._unheard, messages.Sampled)
            self._unheard = None
            if sampled or time.monotonic() > until:
                return  # a device that is free gets its next job before the rest is heard
        if self.worker is not running:
            return  # it was ended after its last message
        if not running.process.is_alive():
            self._bury(running)
        elif running.busy:
            self._end_if_hung(running)
        elif time.monotonic() >= self.unload_at:
            log.info("the worker is ended: it had no work for %.0f s", self.config.gpu.idle_unload_seconds)
            self.end_worker()

    def tell_next(self, place: int, job_id: str | None) -> None:
        """Tell the worker, unless it knows, that the job ``place`` behind the first is its next."""
        running = self.worker
        if running is None or running.job is None or running.told_next == job_id:
            return
        job = self.next_job(place)
        following = job.id if job else None
        if following == running.told_next:
            return
        running.told_next = following
        with contextlib.suppress(KeyError, ValueError, OSError):  # a fault in it shows when it starts
            running.connection.send(messages.Next(self.work_of(job) if job else None))

    def _end_if_hung(self, running: process.Handle) -> None:
        now = time.monotonic()
        # A longer gap between two rounds is not the worker's: this process itself was stopped or busy.
        running.end_if_hung(self.config.hang_seconds, min(now - self._last_round, ROUND_SECONDS))
        self._last_round = now

    def _receive(self, running: process.Handle) -> bool:
        """Receive a message; it is kept until it is recorded, which may fail just now."""
        try:
            if not running.connection.poll():
                return False
            self._unheard = running.connection.recv()
        except (EOFError, OSError):  # it died, perhaps in the middle of a message
            running.process.join()
            return False
        return True

    def _hear(self, running: process.Handle, message: messages.Message | None) -> None:
        running.quiet = 0.0
        if isinstance(message, messages.Written):
            assert running.writing is not None, "only what was sampled is written"
            self._end_run(running.writing, message.reply, running)
            running.writing = None
            running.idle_since = time.monotonic()
            return
        if isinstance(message, messages.Ready):
            self._note_device(running, message)
        elif running.job is None:
            self.helping.hear(running, message)
        elif self._note_progress(running, running.job, message):
            return
        else:
            if isinstance(message, messages.Sampled):
                running.writing, running.unwritten = running.job, 0.0
            else:
                self._end_run(running.job, message, running)
                running.stop_sent = None
            running.job = None
            running.idle_since = time.monotonic()
        if message is not None and messages.leaves_after(message):
            self.end_worker()

    def _end_run(self, job: Job, message: messages.Message | None, running: process.Handle) -> None:
        """Record how the run of a job has ended."""
        match message:
            case messages.Finished():
                self.decide_done(job, message)
            case messages.Stopped():
                self._put_back(job)
            case messages.Blocked():
                self.faults.block(message.reason, device=message.device)
                self._store.requeue(job.id, message.reason)
                log.error("job %s: back in the queue: %s", job.id, message.reason)
            case messages.Waits():
                self.passed_over.device_found(self, message.here)
                self.passed_over.wait_for_device(job.id, message.reason, message.made_on)
                outcomes.put_back(job, self._store, message.reason)
            case messages.Failed(retry=False):
                outcomes.fail(job, self._store, message.error)
            case messages.Failed(device=True) if not running.worked:
                self.faults.failed(outcomes.blame_device(job, self._store, message.error))
            case messages.Failed():
                outcomes.count_attempt(job, self._store, message.error, self.config.max_attempts)
            case messages.Again():
                if message.not_ahead is not None:
                    self._not_ahead.add(message.not_ahead)
                self._store.requeue(job.id, message.reason)
                log.warning("job %s: continues in another worker: %s", job.id, message.reason)

    def _note_device(self, running: process.Handle, found: messages.Ready) -> None:
        self.device, self.hardware, running.loaded = found.device, found.hardware, running.model
        self.passed_over.device_found(self, found.card)
        if running.job is not None:
            self.passed_over.began(running.job.id, found.card)
        if found.device.startswith("cuda") and not self._gpu_used:
            self._store.remember_gpu()
            self._gpu_used = True

    def _note_progress(self, running: process.Handle, job: Job, message: messages.Message | None) -> bool:
        """Record how far a job is; False for a message that ends its run."""
        if isinstance(message, messages.StepDone):
            self.faults.worked()
        return progress.record(running, job, message, self._store)

    def decide_done(self, job: Job, made: messages.Finished) -> None:
        """Record that the video is made, and how it was computed."""
        spec = self.config.spec(job.settings["model"])
        self._store.decide(job.id, State.DONE, device=self.device, **outcomes.how_made(job, made, spec))

    def _bury(self, running: process.Handle) -> None:
        """Record what a dead worker means for its jobs."""
        death, at_fault = running.manner_of_death(), running.at_fault
        if not running.busy and running.lost is None:  # that is told by who knows when it is tried again
            log.warning("the worker ended while idle: %s", death)
        if running.writing is not None and (running.job or running.helps) and not at_fault:
            self._written_alone.add(running.writing.id)  # if it dies again, it is known on which
        for job in sorted(running.jobs, key=lambda job: job is at_fault):  # what counts happens once: last
            if running.ended is not None and running.hung is None:
                # For the daemon's sake; the next worker writes what is to be kept of it.
                self._store.requeue(job.id, STOPPING)  # decides one that was cancelled with nothing to keep
                log.info("job %s: %s", job.id, STOPPING)
            elif job is running.job and running.stop_sent is not None and not self._writes_what_exists:
                self._put_back(job)
            elif job is at_fault:
                outcomes.count_attempt(job, self._store, f"the worker {death}", self.config.max_attempts)
            else:
                outcomes.put_back(job, self._store, f"the worker {death}")
        if running.helps is not None:
            self.helping.end(running, f"its worker {death}")
        self.worker = running.job = running.writing = None  # those who help it see that too
        running.connection.close()

    def _put_back(self, job: Job) -> None:
        """Queue a job again that the worker left; decide one that was cancelled."""
        if job.cancel == "discard" or self._writes_what_exists:  # there was nothing to write
            self._store.decide(job.id, State.CANCELLED, error=CANCELLED["error"])
        else:
            self._store.requeue(job.id, self._why_left)
            log.info("job %s: back in the queue: %s", job.id, self._why_left)

    def leave(self, now: float, why: str) -> None:
        """Have the worker leave its job at the next step; called each round, ends a worker that does not."""
        running = self.worker
        if running is None or not running.busy:
            return
        if running.helps is not None:
            self.helping.leave(running)
        if running.stop_sent is None:
            running.stop_sent = now
            if running.job is None:  # a video that is only written is soon done
                return
            self._why_left = why
            self._writes_what_exists |= why == CANCELLING and running.job.cancel == "keep"
            with contextlib.suppress(OSError):
                running.connection.send(messages.Leave(keep=self._writes_what_exists))
        elif why == STOPPING and now - running.stop_sent > STOP_SECONDS:
            running.end(f"it did not leave its job within {STOP_SECONDS:.0f} s")

    def kill(self) -> None:
        """End the worker at once; its jobs go back to the queue."""
        if self.worker is not None:
            self.worker.end("the daemon was told to stop at once")

    def end_worker(self) -> None:
        """End an idle worker, which frees the GPU's memory."""
        if self.worker is None:
            return
        self.worker.retire()
        self.worker = None
