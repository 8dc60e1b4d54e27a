"""Runs jobs on the worker, one at a time, and decides how each ends: done, retried or failed."""

import contextlib
import logging
import math
import time
from multiprocessing.connection import Connection
from typing import Any

from framepack_core.models.registry import ModelSpec
from framepackd.jobs import job_warnings
from framepackd.jobs.job import Job, State
from framepackd.jobs.job_sql import CANCELLED
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.settings import loras
from framepackd.settings.config import Config
from framepackd.supervisor import process
from framepackd.supervisor.passed_over import PassedOver
from framepackd.supervisor.work import work_of
from framepackd.worker import messages

log = logging.getLogger(__name__)

STOPPING, CANCELLING = "stopped with the daemon", "cancelled"  # why a worker leaves its job
STOP_SECONDS = 90.0  # for the step or decode in progress; then the worker is ended
LISTEN_SECONDS = 0.5  # to a worker that speaks faster than can be recorded; then others are heard
ROUND_SECONDS = 5.0  # while a job runs, the loop comes by at least this often
DEVICE_FAULTS = 2  # in fresh workers, one after the other, are no job's
RETRY_SECONDS = 30.0  # before something that kept a job from going on is tried again
MAX_DOUBLINGS = 4  # of that, while a device stays away: a worker takes seconds of CPU time to look for it


class Supervisor:
    """The worker process, and the job it is on."""

    def __init__(self, config: Config, store: JobStore) -> None:
        """Start nothing yet: the worker process comes with the first job."""
        self.config = config
        self._store = store
        self.worker: process.Handle | None = None
        self._last_round = time.monotonic()
        self._unheard: messages.Message | None = None  # taken from the connection, not yet recorded
        self._why_left = STOPPING  # if the worker is told to leave its job
        self._writes_what_exists = False  # the worker was told to leave and keep
        self._blocked: str | None = None
        self._device_faults = 0  # of workers in a row that had not done a step
        self.passed_over = PassedOver(store)
        self._not_ahead: set[str] = set()  # jobs that broke the device when they were encoded ahead
        self.device = config.gpu.device  # until the worker tells what "auto" has become
        self.hardware: str | None = None
        self._gpu_used = store.gpu_used()

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return self.worker is not None and self.worker.job is not None

    @property
    def unload_at(self) -> float:
        """When the worker has been idle for so long that it is ended, on the monotonic clock."""
        seconds = self.config.gpu.idle_unload_seconds
        if self.worker is None or self.worker.job is not None or not seconds:
            return math.inf
        return self.worker.idle_since + seconds

    @property
    def sources(self) -> list[Connection | int]:
        """What becomes ready when there is something to listen to."""
        return [] if self.worker is None else [self.worker.connection, self.worker.process.sentinel]

    @property
    def cancelling(self) -> bool:
        """Whether the running job is to be left for good."""
        return self.worker is not None and self.worker.job is not None and bool(self.worker.job.cancel)

    def take_block(self) -> str | None:
        """Say why disk or device kept the last job from going on, once."""
        reason, self._blocked = self._blocked, None
        return reason

    @property
    def patience(self) -> float:
        """How many seconds to wait before what kept a job from going on is tried again."""
        doublings = min(max(self._device_faults - DEVICE_FAULTS, 0), MAX_DOUBLINGS)
        return RETRY_SECONDS * (1 << doublings)

    def next_job(self) -> Job | None:
        """Give the job that is to run next."""
        return self.passed_over.next_job(self.config)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What a person should put right before all jobs can run."""
        return self.passed_over.problems(self.config)

    @property
    def why_passed_over(self) -> str | None:
        """Say why jobs are passed over, and what to do; None if none are."""
        return "; ".join(problem.text for problem in self.problems) or None

    def start(self, job: Job) -> None:
        """Start a job of the queue; none may run."""
        try:
            work = self.work_of(job)
        except (KeyError, ValueError) as error:  # taken in under another config or version
            self._fail(job, f"its settings do not fit the config any more ({error}): drop its files again")
            return
        if self.worker is None:
            self.worker = process.start(self.config.gpu.device)
        self.worker.job = self._store.claim(job.id)  # last: what fails before leaves it in the queue
        if self.worker.job is None:  # cancelled meanwhile
            return
        self.worker.quiet, self.worker.awaited, self.worker.slowest = 0.0, "start", {}
        self.worker.told_next = None
        self._writes_what_exists = job.cancel is not None
        log.info("job %s: %s started (%s)", job.id, job.path, work.spec.name)
        with contextlib.suppress(OSError):  # it died just now: noticed when it is listened to
            self.worker.connection.send(work)

    def work_of(self, job: Job) -> messages.Work:
        """Give a job as the worker is sent it.

        Raises:
            KeyError, ValueError: its settings do not fit the configuration any more.
        """
        may_be_ahead = job.id not in self._not_ahead
        return work_of(job, self.config, self._store, gpu_used=self._gpu_used, may_be_ahead=may_be_ahead)

    def listen(self) -> None:
        """Take in what the worker says, and notice when it is gone."""
        running = self.worker
        if running is None:
            return
        until = time.monotonic() + LISTEN_SECONDS
        while self._unheard is not None or self._receive(running):
            self._hear(running, self._unheard)
            self._unheard = None
            if time.monotonic() > until:
                return
        if not running.process.is_alive():
            self._bury(running)
        elif running.job is not None:
            self._end_if_hung(running)
            self._tell_next(running)
        elif time.monotonic() >= self.unload_at:
            log.info("the worker is ended: it had no work for %.0f s", self.config.gpu.idle_unload_seconds)
            self.end_worker()

    def _tell_next(self, running: process.Handle) -> None:
        """Have the worker know what comes next, so that it encodes nothing between two jobs."""
        job = self.next_job()
        following = job.id if job else None
        if following == running.told_next:
            return
        running.told_next = following
        with contextlib.suppress(KeyError, ValueError, OSError):  # what is wrong with it shows when it starts
            running.connection.send(messages.Next(self.work_of(job) if job else None))

    def _end_if_hung(self, running: process.Handle) -> None:
        """End a worker that gives no sign of life for much longer than it ever needed."""
        now = time.monotonic()
        # A longer gap between two rounds was not the worker's: this process was stopped, or busy, itself.
        running.quiet += min(now - self._last_round, ROUND_SECONDS)
        self._last_round = now
        running.end_if_hung(self.config.hang_seconds)

    def _receive(self, running: process.Handle) -> bool:
        """Take a message; it is kept until what follows from it is recorded, which may fail just now."""
        try:
            if not running.connection.poll():
                return False
            self._unheard = running.connection.recv()
        except (EOFError, OSError):  # gone, perhaps in the middle of a word
            running.process.join()
            return False
        return True

    def _hear(self, running: process.Handle, message: messages.Message | None) -> None:
        job = running.job
        assert job is not None, "the worker speaks only about its job"
        running.quiet = 0.0
        if self._note_progress(running, job, message):
            return
        match message:
            case messages.Finished():
                self.decide_done(job, message)
            case messages.Stopped():
                self._put_back(job)
            case messages.Blocked():
                self._blocked = message.reason
                self._device_faults += message.device
                self._store.requeue(job.id, message.reason)
                log.error("job %s: back in the queue: %s", job.id, message.reason)
            case messages.Waits():
                self.passed_over.wait_for_device(job.id, message.reason, message.made_on)
                self._store.requeue(job.id, message.reason)
                log.warning("job %s: waits: %s", job.id, message.reason)
            case messages.Failed(retry=False):
                self._fail(job, message.error)
            case messages.Failed(device=True) if not running.worked:
                self._note_device_fault(job, message.error)
            case messages.Failed():
                self._count_attempt(job, message.error)
            case messages.Again():
                if message.not_ahead is not None:
                    self._not_ahead.add(message.not_ahead)
                self._store.requeue(job.id, message.reason)
                log.warning("job %s: goes on in another worker: %s", job.id, message.reason)
        running.job = None
        running.stop_sent = None
        running.idle_since = time.monotonic()
        if message is not None and messages.leaves_after(message):
            self.end_worker()

    def _note_progress(self, running: process.Handle, job: Job, message: messages.Message | None) -> bool:
        """Record how far a job is; False for a message that ends the worker's turn on it."""
        match message:
            case messages.Resumed():
                self._store.resumed(job.id, steps=message.steps)
                if message.steps:
                    log.info("job %s: goes on after step %d of %d", job.id, message.steps, job.steps_total)
            case messages.SetAside():
                self._store.note(job.id, message.text)
                log.warning("job %s: %s", job.id, message.text)
            case messages.PromptsCut():
                _note_cuts(job, message, self._store)
            case messages.Ready():
                self.device, self.hardware = message.device, message.hardware
                self.passed_over.device_is_there(message.device)
                if message.device.startswith("cuda") and not self._gpu_used:
                    self._store.remember_gpu()
                    self._gpu_used = True
            case messages.Lowered():
                self._store.remember_rung(message.key, message.rung)
                log.warning("job %s: out of memory, going on with %s", job.id, message.text)
            case messages.Uncompiled():
                self._store.remember_uncompiled(message.key, message.reason)
                log.warning(
                    "job %s: cannot compile (%s): it and later ones go on without, which is slower, until "
                    "the driver, torch or triton changes; compile = true tries all the same",
                    job.id,
                    message.reason,
                )
            case messages.StepDone():
                running.worked, self._device_faults = True, 0
                # The first step warms everything up: it tells nothing of the next.
                if running.awaited == "step":
                    running.slowest["step"] = max(message.seconds, running.slowest.get("step", 0.0))
                running.awaited = "step" if message.step < job.steps else "decode"
                self._store.step(job.id, section=message.section, step=message.step, seconds=message.seconds)
            case messages.SectionDecoded():
                running.slowest["decode"] = max(message.seconds, running.slowest.get("decode", 0.0))
                running.awaited = "end" if message.section == job.sections else "step"
                self._store.decoded(job.id, seconds=message.seconds)
            case _:
                return False
        return True

    def _note_device_fault(self, job: Job, error: str) -> None:
        """A worker has failed on the device before it did a step: twice in a row it is the device, no job."""
        self._device_faults += 1
        first = error.partition("\n")[0]
        self._store.requeue(job.id, first)
        if self._device_faults >= DEVICE_FAULTS:
            self._blocked = (
                f"the device failed in {self._device_faults} fresh workers in a row ({first}): look at "
                "nvidia-smi and dmesg, and restart the machine if it stays so; it is tried again and again"
            )
        log.error("job %s: back in the queue: the device failed: %s", job.id, first)

    def decide_done(self, job: Job, made: messages.Finished) -> None:
        """Record that the video is made, and how."""
        spec = self.config.spec(job.settings["model"])
        self._store.decide(job.id, State.DONE, device=self.device, **_how_made(job, made, spec))

    def _bury(self, running: process.Handle) -> None:
        """The worker is dead; so may be its attempt at a job."""
        job = running.job
        if job is None:
            log.warning("the worker ended while idle: %s", running.manner_of_death())
        elif running.ended is not None and running.hung is None:
            self._interrupted(job)
        elif running.stop_sent is not None and not self._writes_what_exists:
            self._put_back(job)
        else:
            self._count_attempt(job, f"the worker {running.manner_of_death()}")
        self.worker = None
        running.connection.close()

    def _put_back(self, job: Job) -> None:
        """The worker has left its job; one that was cancelled is thereby decided."""
        if job.cancel == "discard" or self._writes_what_exists:  # there was nothing to write
            self._store.decide(job.id, State.CANCELLED, error=CANCELLED["error"])
            return
        self._store.requeue(job.id, self._why_left)
        log.info("job %s: in the queue again: %s", job.id, self._why_left)

    def _interrupted(self, job: Job) -> None:
        """The worker was ended for the daemon's sake; the next one writes what is to be kept."""
        self._store.requeue(job.id, STOPPING)  # one that was cancelled, without a wish to keep, is decided
        log.info("job %s: %s", job.id, STOPPING)

    def _count_attempt(self, job: Job, error: str) -> None:
        limit = self.config.max_attempts
        attempts = self._store.count_attempt(job.id, error, max_attempts=limit)
        log.warning("job %s: attempt %d of %d: %s", job.id, attempts, limit, error)

    def _fail(self, job: Job, error: str) -> None:
        log.error("job %s: failed: %s", job.id, error)
        self._store.decide(job.id, State.FAILED, error=error)

    def runs(self, job_id: str) -> bool:
        """Say whether this is the job that runs."""
        return self.worker is not None and self.worker.job is not None and self.worker.job.id == job_id

    def cancel(self, how: str) -> None:
        """Take note that the job that runs is cancelled, ``how`` as in its row."""
        if self.worker is not None and self.worker.job is not None:
            self.worker.job.cancel = how

    def leave(self, now: float, why: str) -> None:
        """Have the worker leave its job at the next step; called again and again, end it if it does not."""
        running = self.worker
        if running is None or running.job is None:
            return
        if running.stop_sent is None:
            running.stop_sent = now
            self._why_left = why
            self._writes_what_exists |= why == CANCELLING and running.job.cancel == "keep"
            with contextlib.suppress(OSError):
                running.connection.send(messages.Leave(keep=self._writes_what_exists))
        elif why == STOPPING and now - running.stop_sent > STOP_SECONDS:
            running.end(f"it did not leave its job within {STOP_SECONDS:.0f} s")

    def kill(self) -> None:
        """End the worker at once; the job goes back to the queue."""
        if self.worker is not None:
            self.worker.end("the daemon was told to stop at once")

    def end_worker(self) -> None:
        """End an idle worker, which gives back the memory of the GPU."""
        if self.worker is None:
            return
        self.worker.retire()
        self.worker = None


def _note_cuts(job: Job, message: messages.PromptsCut, store: JobStore) -> None:
    """Record what is cut off, once: a job that goes on, or has many clips, says it again."""
    found = job_warnings.recorded(job.settings, message.cuts)
    cuts = [*job.cuts, *(cut for cut in found if cut not in job.cuts)]
    if cuts == job.cuts:
        return
    for text in job_warnings.of_cuts(cuts[len(job.cuts) :]):
        log.warning("job %s: %s", job.id, text)
    store.cut(job.id, cuts)
    job.cuts = cuts


def _how_made(job: Job, made: messages.Finished, spec: ModelSpec) -> dict[str, Any]:
    """Give what a job's row says of how its video was made."""
    merged = job.settings.get("loras", [])
    if made.loras:
        merged = loras.with_counts(merged, made.loras)
    continues = job.settings.get("continues")
    if continues is not None:
        continues = continues | {"encoded_anew": made.encoded_anew}
    sources = ("transformer", "base", "image_encoder", *(("mag_ratios",) if spec.mag_ratios else ()))
    return {
        "settings": job.settings | {"loras": merged, "continues": continues},
        "timings": made.timings,
        "versions": made.versions,
        "computation": made.computation,
        "quality": made.quality,
        "model_sources": {name: str(getattr(spec, name)) for name in sources},
    }
