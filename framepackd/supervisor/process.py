"""Starts the worker process, or the bridge to one elsewhere; notices when it hangs, says how it died."""

import math
import multiprocessing.process
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from framepackd.jobs.job import Job
from framepackd.settings.config import Config
from framepackd.worker import main, messages
from framepackd.worker.spawning import spawn

# A worker hangs if it takes this many times as long as ever before, or as the minimum if nothing is known.
HANG_FACTOR, FIRST_FACTOR = 10, 30


@dataclass
class Handle:
    """The daemon's end of the worker: the process, the connection, and its job."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    job: Job | None = None  # that it computes
    writing: Job | None = None  # that is sampled, and whose video it writes meanwhile
    unwritten: float = 0.0  # seconds since that was sampled
    model: str | None = None  # that its last job asked for
    loaded: str | None = None  # that it has said to be loaded
    remains: float = math.inf  # seconds that its job may still sample
    clips: list[int] = field(default_factory=list)  # steps done of each clip of its job, by all workers
    helps: Job | None = None  # that another worker computes, and of which it makes clips
    told_next: str | None = None  # the id of the job that it was told comes next
    idle_since: float = field(default_factory=time.monotonic)
    stop_sent: float | None = None
    quiet: float = 0.0  # seconds since the last sign of life
    awaited: str = "start"  # the next sign of life: start, step, decode or end
    slowest: dict[str, float] = field(default_factory=dict)  # seconds, by what was awaited
    in_section: float = 0.0  # seconds of steps in the section at hand, in this run
    worked: bool = False  # it has done a step: the device works
    hung: str | None = None  # why it was ended; a job loses an attempt
    hung_on: Job | None = None  # that job
    ended: str | None = None  # why it was ended; the job loses nothing
    hello: messages.Hello | None = None  # of a bridge: it has reached its card
    died: str | None = None  # of a bridge: how the worker on the other machine ended
    lost: str | None = None  # of a bridge: why it does not reach that any more; the job loses nothing

    @property
    def jobs(self) -> list[Job]:
        """The jobs that end with it: the one that it computes first."""
        return [job for job in (self.job, self.writing) if job is not None]

    @property
    def busy(self) -> bool:
        """Whether it does anything."""
        return bool(self.jobs) or self.helps is not None

    @property
    def at_fault(self) -> Job | None:
        """The job that loses an attempt for its death; of two, none if nobody knows on which it died."""
        if self.hung_on is not None or self.ended is not None or self.lost is not None:
            return self.hung_on
        return self.jobs[0] if len(self.jobs) == 1 and self.helps is None else None

    def manner_of_death(self) -> str:
        """Say in words how the process ended."""
        if said := self.hung or self.ended or self.lost or self.died:
            return said
        return main.manner_of_death(self.process.exitcode or 0)

    def begin(self, model: str) -> None:
        """Forget what was so of the last job that it computed."""
        self.quiet, self.awaited, self.slowest = 0.0, "start", {}
        self.told_next, self.model, self.stop_sent = None, model, None
        self.loaded = model if model == self.loaded else None  # it frees the other one first
        self.remains, self.in_section, self.clips = math.inf, 0.0, []

    def count(self, job: Job, section: int, step: int) -> int:
        """Count the steps of its job that are done, now that this one of a section is."""
        clip, before = divmod(section - 1, job.sections // job.clips)
        self.clips = self.clips or [0] * job.clips
        self.clips[clip] = before * job.steps + step
        return sum(self.clips)

    def end_if_hung(self, least: float, passed: float) -> None:
        """End the process if it is silent much longer than ever before, and at least ``least`` seconds.

        ``passed``: the seconds since this was asked last.
        """
        self.quiet += passed
        self.unwritten += passed
        if self.writing is not None and self.unwritten > least * FIRST_FACTOR:
            self._end_as_hung(self.writing, f"it wrote no video within {self.unwritten:.0f} s")
        known = self.slowest.get(self.awaited)
        bound = least * FIRST_FACTOR if known is None else max(least, known * HANG_FACTOR)
        computed = self.job or self.helps
        if computed is not None and self.quiet > bound:
            usual = "" if known is None else f", where it had never needed more than {known:.1f} s"
            self._end_as_hung(computed, f"it did nothing for {self.quiet:.0f} s ({self.awaited}){usual}")

    def _end_as_hung(self, job: Job, why: str) -> None:
        if self.hung is None and self.ended is None:
            self.hung, self.hung_on = f"was ended: {why}", job
            self.process.kill()

    def end(self, why: str) -> None:
        """End the process at once; the job loses nothing."""
        self.ended = self.ended or f"was ended: {why}"
        self.process.kill()

    def retire(self) -> None:
        """End an idle process, and wait until it is gone."""
        self.connection.close()  # an idle worker reads the end of input and returns
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def start(device: str) -> Handle:
    """Start a worker process; it loads torch, to compute on a device, and then waits for work."""
    return Handle(*spawn(main.main, device, name="framepackd-worker"))


def start_bridge(config: Config, host: str, device: str) -> Handle:
    """Start a bridge to a device of another machine; it greets, and then waits for work."""
    from framepackd.cluster import bridge  # who computes on this machine alone needs nothing of it

    way = bridge.Way(config.cluster.socket_path, host, device, config.jobs_dir, config.lora_dir)
    return Handle(*bridge.start(way))
