"""Runs jobs on a worker process, one at a time, and judges how each of them ends."""

import contextlib
import logging
import time
from typing import Any

from framepack_core.request import GenerationSettings, Request
from framepackd import delivery, intake, worker
from framepackd.config import Config
from framepackd.database import Job, State
from framepackd.delivery import CHECKPOINT
from framepackd.jobs import JobStore

log = logging.getLogger(__name__)

STOP_SECONDS = 90.0  # for the step or decode in progress; then the worker is ended
ROUND_SECONDS = 5.0  # while a job runs, the loop comes by at least this often
# A worker hangs if it takes this many times as long as ever before; what was never seen may take longer.
HANG_FACTOR, FIRST_FACTOR = 10, 30


class Runner:
    """The worker process, and the job it is on."""

    def __init__(self, config: Config, store: JobStore) -> None:
        """Start nothing yet: the worker process comes with the first job."""
        self._config = config
        self._store = store
        self._worker: worker.Handle | None = None
        self._last_round = time.monotonic()
        self.device = config.gpu.device  # until the worker tells what "auto" has become

    def reconfigure(self, config: Config) -> None:
        """Take another configuration, for the jobs that start from now on."""
        self._config = config

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return self._worker is not None and self._worker.job is not None

    @property
    def sources(self) -> list[Any]:
        """What becomes ready when there is something to listen to."""
        return [] if self._worker is None else [self._worker.connection, self._worker.process.sentinel]

    def start_next(self) -> None:
        """Start the next queued job, unless one runs."""
        if self.busy:
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
        self._worker.quiet, self._worker.awaited, self._worker.slowest = 0.0, "start", {}
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
            fingerprint=job.fingerprint,
            result=folder / delivery.RESULT,
            checkpoint=folder / CHECKPOINT,
            sections=job.sections,
            frames=job.frames,
            size=(job.height, job.width),
            crf=job.settings["crf"],
            save_section_frames=job.settings["save_section_frames"],
            keep_latents=job.settings.get("keep_latents", False),
            device=self._config.gpu.device,
            dtype=self._config.gpu.dtype,
            rungs={},
        )

    def listen(self) -> None:
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
        elif running.job is not None:
            self._end_if_hung(running)

    def _end_if_hung(self, running: worker.Handle) -> None:
        """End a worker that gives no sign of life for much longer than it ever needed."""
        now = time.monotonic()
        # A longer gap between two rounds was not the worker's: this process was stopped, or busy, itself.
        running.quiet += min(now - self._last_round, ROUND_SECONDS)
        self._last_round = now
        least = self._config.hang_seconds
        known = running.slowest.get(running.awaited)
        bound = least * FIRST_FACTOR if known is None else max(least, known * HANG_FACTOR)
        if running.quiet > bound and running.hung is None:
            usual = "" if known is None else f", where {known:.1f} s were the most before"
            running.hung = f"was ended: it did nothing for {running.quiet:.0f} s ({running.awaited}){usual}"
            running.process.kill()

    def _hear(self, running: worker.Handle, message: worker.Message) -> None:
        job = running.job
        assert job is not None, "the worker speaks only about its job"
        running.quiet = 0.0
        match message:
            case worker.Resumed():
                self._store.resumed(job.id, steps=message.steps)
                if message.steps:
                    log.info("job %s: goes on after step %d of %d", job.id, message.steps, job.steps_total)
                return
            case worker.Ready():
                self.device = message.device
                return
            case worker.Lowered():
                log.warning("job %s: out of memory, going on with %s", job.id, message.text)
                return
            case worker.StepDone():
                # The first step warms everything up: it tells nothing of the next.
                if running.awaited == "step":
                    running.slowest["step"] = max(message.seconds, running.slowest.get("step", 0.0))
                running.awaited = "step" if message.step < job.steps else "decode"
                self._store.step(job.id, section=message.section, step=message.step, seconds=message.seconds)
                return
            case worker.SectionDecoded():
                running.slowest["decode"] = max(message.seconds, running.slowest.get("decode", 0.0))
                running.awaited = "end" if message.section == job.sections else "step"
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
                    quality=message.quality,
                    device=self.device,
                    model_sources={name: str(getattr(spec, name)) for name in sources},
                )
            case worker.Stopped():
                self._store.requeue(job.id, "stopped with the daemon")
                log.info("job %s: back in the queue: the daemon stops", job.id)
            case worker.Blocked():
                self._store.requeue(job.id, message.reason)
                log.error("job %s: back in the queue: %s", job.id, message.reason)
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
        elif running.stop_sent is not None:
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

    def leave(self, now: float) -> None:
        """Have the worker leave its job at the next step; called again and again, end it if it does not."""
        running = self._worker
        if running is None or running.job is None:
            return
        if running.stop_sent is None:
            running.stop_sent = now
            with contextlib.suppress(OSError):
                running.connection.send(worker.Leave())
        elif now - running.stop_sent > STOP_SECONDS:
            running.process.kill()

    def kill(self) -> None:
        """End the worker at once; the job goes back to the queue."""
        if self._worker is not None:
            self._worker.stop_sent = time.monotonic()
            self._worker.process.kill()

    def end_worker(self) -> None:
        """End an idle worker, which gives back the memory of the GPU."""
        if self._worker is None:
            return
        self._worker.connection.close()  # idle, it reads the end and returns
        self._worker.process.join(5)
        if self._worker.process.is_alive():
            self._worker.process.kill()
            self._worker.process.join()
        self._worker = None
