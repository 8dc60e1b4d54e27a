"""Runs jobs on the worker, one at a time, and decides how each ends.

A job is done, tried again (at most ``max_attempts`` times) or failed.
"""

import contextlib
import logging
import math
import time
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from typing import Any

from framepack_core.models.registry import ModelSpec
from framepackd.jobs import job_warnings, pace
from framepackd.jobs.job import Job, State
from framepackd.jobs.job_sql import CANCELLED
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.settings import loras
from framepackd.settings.config import Config
from framepackd.supervisor import process
from framepackd.supervisor.passed_over import PassedOver
from framepackd.supervisor.work import work_of
from framepackd.text import duration
from framepackd.worker import messages

log = logging.getLogger(__name__)

STOPPING, CANCELLING = "stopped with the daemon", "cancelled"  # why a worker leaves its job
STOP_SECONDS = 90.0  # for the step or decode in progress; then the worker is ended
LISTEN_SECONDS = 0.5  # at most, to a worker that sends faster than messages can be recorded
ROUND_SECONDS = 5.0  # at most, between two rounds of the loop while a job runs
DEVICE_FAULTS = 2  # in a row, in fresh workers: the device is at fault, not the job
RETRY_SECONDS = 30.0  # before something that kept a job from going on is tried again
MAX_DOUBLINGS = 4  # of that, while a device is missing: a worker takes seconds of CPU time to find out


class Supervisor:
    """The worker process and its job."""

    def __init__(self, config: Config, store: JobStore) -> None:
        """Start nothing yet: the worker process starts with the first job."""
        self.config = config
        self._store = store
        self.worker: process.Handle | None = None
        self._last_round = time.monotonic()
        self._unheard: messages.Message | None = None  # received, not yet recorded
        self._why_left = STOPPING  # why the worker is to leave its job
        self._writes_what_exists = False  # the worker writes what exists and generates no more
        self._blocked: str | None = None  # why disk or device stopped the last job
        self._device_faults = 0  # of workers in a row that had not done a step
        self.passed_over = PassedOver(store)
        self._not_ahead: set[str] = set()  # jobs that broke the device when they were encoded ahead
        self.device = config.gpu.device  # until the worker reports what "auto" means here
        self.hardware: str | None = None
        self._gpu_used = store.gpu_used()

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return self.worker is not None and self.worker.job is not None

    @property
    def unload_at(self) -> float:
        """When an idle worker is ended, on the monotonic clock; inf for never."""
        seconds = self.config.gpu.idle_unload_seconds
        if self.worker is None or self.worker.job is not None or not seconds:
            return math.inf
        return self.worker.idle_since + seconds

    @property
    def sources(self) -> list[Connection | int]:
        """What becomes readable when the worker has sent a message or died."""
        return [] if self.worker is None else [self.worker.connection, self.worker.process.sentinel]

    @property
    def cancelling(self) -> bool:
        """Whether the running job was cancelled."""
        return self.worker is not None and self.worker.job is not None and bool(self.worker.job.cancel)

    def take_block(self) -> str | None:
        """Say why disk or device stopped the last job; None at the second call."""
        reason, self._blocked = self._blocked, None
        return reason

    @property
    def patience(self) -> float:
        """How many seconds to wait before a blocked job is tried again."""
        doublings = min(max(self._device_faults - DEVICE_FAULTS, 0), MAX_DOUBLINGS)
        return RETRY_SECONDS * (1 << doublings)

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
        except (KeyError, ValueError) as error:  # its settings are of another config or version
            self._fail(job, f"its settings do not fit the config any more ({error}): drop its files again")
            return
        if self.worker is None:
            self.worker = process.start(self.config.gpu.device)
        self.worker.job = self._store.claim(job.id)  # last: a failure before it leaves the job in the queue
        if self.worker.job is None:  # cancelled meanwhile
            return
        self.worker.quiet, self.worker.awaited, self.worker.slowest = 0.0, "start", {}
        self.worker.told_next, self.worker.in_section = None, 0.0
        self._writes_what_exists = job.cancel is not None
        log.info("job %s: %s started (%s)", job.id, job.path, work.spec.name)
        with contextlib.suppress(OSError):  # it died just now: listen() notices
            self.worker.connection.send(work)

    def work_of(self, job: Job) -> messages.Work:
        """Describe a job for the worker.

        Raises:
            KeyError, ValueError: its settings do not fit the configuration any more.
        """
        may_be_ahead = job.id not in self._not_ahead
        return work_of(job, self.config, self._store, gpu_used=self._gpu_used, may_be_ahead=may_be_ahead)

    def listen(self) -> None:
        """Record the worker's messages, and notice when it hangs, dies or is idle for too long."""
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
        """Tell the worker which job comes next: it encodes the inputs ahead of time."""
        job = self.passed_over.next_job(self.config)
        following = job.id if job else None
        if following == running.told_next:
            return
        running.told_next = following
        with contextlib.suppress(KeyError, ValueError, OSError):  # a fault in it shows when it starts
            running.connection.send(messages.Next(self.work_of(job) if job else None))

    def _end_if_hung(self, running: process.Handle) -> None:
        now = time.monotonic()
        # A longer gap between two rounds is not the worker's: this process itself was stopped or busy.
        running.quiet += min(now - self._last_round, ROUND_SECONDS)
        self._last_round = now
        running.end_if_hung(self.config.hang_seconds)

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
        job = running.job
        assert job is not None, "the worker reports only on its job"
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
                log.warning("job %s: continues in another worker: %s", job.id, message.reason)
        running.job = None
        running.stop_sent = None
        running.idle_since = time.monotonic()
        if message is not None and messages.leaves_after(message):
            self.end_worker()

    def _note_progress(self, running: process.Handle, job: Job, message: messages.Message | None) -> bool:
        """Record how far a job is; False for a message that ends its run."""
        match message:
            case messages.Resumed():
                self._store.resumed(job.id, steps=message.steps)
                if message.steps:
                    log.info("job %s: resumed after step %d of %d", job.id, message.steps, job.steps_total)
            case messages.SetAside():
                self._store.note(job.id, message.text)
                log.warning("job %s: %s", job.id, message.text)
            case messages.PromptsCut():
                _note_cuts(job, message, self._store)
            case messages.Ready():
                self.device, self.hardware = message.device, message.hardware
                self.passed_over.device_found(message.device)
                if message.device.startswith("cuda") and not self._gpu_used:
                    self._store.remember_gpu()
                    self._gpu_used = True
            case messages.Lowered():
                self._store.remember_level(message.key, message.level)
                log.warning("job %s: out of memory, continuing with %s", job.id, message.text)
            case messages.Uncompiled():
                self._store.remember_uncompiled(message.key, message.reason)
                log.warning(
                    "job %s: cannot compile (%s): this job and later ones run uncompiled, which is slower, "
                    "until the driver, torch or triton changes; compile = true tries again",
                    job.id,
                    message.reason,
                )
            case messages.StepDone():
                running.worked, self._device_faults = True, 0
                # The first step warms everything up: its time predicts nothing.
                if running.awaited == "step":
                    running.slowest["step"] = max(message.seconds, running.slowest.get("step", 0.0))
                running.awaited = "step" if message.step < job.steps else "decode"
                running.in_section += message.seconds
                self._store.step(job.id, section=message.section, step=message.step, seconds=message.seconds)
            case messages.SectionDecoded():
                running.slowest["decode"] = max(message.seconds, running.slowest.get("decode", 0.0))
                running.awaited = "end" if message.section == job.sections else "step"
                self._store.decoded(job.id, section=message.section, seconds=message.seconds)
                _log_section(self._store.get(job.id), message.section, running.in_section + message.seconds)
                running.in_section = 0.0
            case _:
                return False
        return True

    def _note_device_fault(self, job: Job, error: str) -> None:
        """Record that a worker failed before its first step: twice in a row it is the device, not the job."""
        self._device_faults += 1
        first = error.partition("\n")[0]
        self._store.requeue(job.id, first)
        if self._device_faults >= DEVICE_FAULTS:
            self._blocked = (
                f"the device failed in {self._device_faults} fresh workers in a row ({first}): look at "
                "nvidia-smi and dmesg, and restart the machine if it persists; the daemon keeps trying"
            )
        log.error("job %s: back in the queue: the device failed: %s", job.id, first)

    def decide_done(self, job: Job, made: messages.Finished) -> None:
        """Record that the video is made, and how it was computed."""
        spec = self.config.spec(job.settings["model"])
        self._store.decide(job.id, State.DONE, device=self.device, **_how_made(job, made, spec))

    def _bury(self, running: process.Handle) -> None:
        """Record what a dead worker means for its job."""
        job = running.job
        if job is None:
            log.warning("the worker ended while idle: %s", running.manner_of_death())
        elif running.ended is not None and running.hung is None:
            # For the daemon's sake; the next worker writes what is to be kept of it.
            self._store.requeue(job.id, STOPPING)  # decides one that was cancelled with nothing to keep
            log.info("job %s: %s", job.id, STOPPING)
        elif running.stop_sent is not None and not self._writes_what_exists:
            self._put_back(job)
        else:
            self._count_attempt(job, f"the worker {running.manner_of_death()}")
        self.worker = None
        running.connection.close()

    def _put_back(self, job: Job) -> None:
        """Queue a job again that the worker left; decide one that was cancelled."""
        if job.cancel == "discard" or self._writes_what_exists:  # there was nothing to write
            self._store.decide(job.id, State.CANCELLED, error=CANCELLED["error"])
            return
        self._store.requeue(job.id, self._why_left)
        log.info("job %s: back in the queue: %s", job.id, self._why_left)

    def _count_attempt(self, job: Job, error: str) -> None:
        limit = self.config.max_attempts
        attempts = self._store.count_attempt(job.id, error, max_attempts=limit)
        log.warning("job %s: attempt %d of %d: %s", job.id, attempts, limit, error)

    def _fail(self, job: Job, error: str) -> None:
        log.error("job %s: failed: %s", job.id, error)
        self._store.decide(job.id, State.FAILED, error=error)

    def runs(self, job_id: str) -> bool:
        """Say whether this job runs."""
        return self.worker is not None and self.worker.job is not None and self.worker.job.id == job_id

    def cancel(self, how: str) -> None:
        """Note that the running job is cancelled, ``how`` as in its row."""
        if self.worker is not None and self.worker.job is not None:
            self.worker.job.cancel = how

    def leave(self, now: float, why: str) -> None:
        """Have the worker leave its job at the next step; called each round, ends a worker that does not."""
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
        """End an idle worker, which frees the GPU's memory."""
        if self.worker is None:
            return
        self.worker.retire()
        self.worker = None


def _log_section(job: Job, section: int, seconds: float) -> None:
    """Log that a section is done, how long it took in this run, and about how long the rest takes."""
    left = pace.remaining(job, None, datetime.now(UTC))
    rest = f", about {duration(left)} left" if left and section < job.sections else ""
    log.info("job %s: section %d of %d done in %s%s", job.id, section, job.sections, duration(seconds), rest)


def _note_cuts(job: Job, message: messages.PromptsCut, store: JobStore) -> None:
    """Record cut prompts, each once: a resumed job, or one of many clips, reports them again."""
    found = job_warnings.recorded(job.settings, message.cuts)
    cuts = [*job.cuts, *(cut for cut in found if cut not in job.cuts)]
    if cuts == job.cuts:
        return
    for text in job_warnings.of_cuts(cuts[len(job.cuts) :]):
        log.warning("job %s: %s", job.id, text)
    store.cut(job.id, cuts)
    job.cuts = cuts


def _how_made(job: Job, made: messages.Finished, spec: ModelSpec) -> dict[str, Any]:
    """Give the columns of a job's row that say how its video was made."""
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
