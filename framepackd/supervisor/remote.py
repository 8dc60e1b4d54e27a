"""Runs jobs on the card of another machine: greets it first, and knows when it is out of reach.

Its worker is there; the process here is the bridge to it. A bridge that loses the machine is no job's fault.
A worker that dies there is what the death of a worker here would be.
"""

import logging
import math
import time
from dataclasses import replace

from framepackd.jobs.job import Job, utc_now
from framepackd.jobs.store import JobStore
from framepackd.settings.config import Config
from framepackd.supervisor import process
from framepackd.supervisor.passed_over import PassedOver
from framepackd.supervisor.supervisor import Supervisor
from framepackd.worker import messages

log = logging.getLogger(__name__)

GREETING_SECONDS = 90.0  # for a bridge to say something; it gives up earlier by itself
FIRST_WAIT_SECONDS = 2.0  # before a lost card is greeted again; doubles from one loss to the next
LONGEST_WAIT_SECONDS = 300.0
LOOK_AGAIN_SECONDS = 300.0  # before a card that lacks a model is asked whether it is there now
SLACK_SECONDS = 1.0  # between the clocks of two machines
DRAINED = "its machine is drained"  # why a worker leaves its job


class RemoteSupervisor(Supervisor):
    """The bridge to one card of another machine, and what runs there."""

    def __init__(self, config: Config, store: JobStore, name: str, passed_over: PassedOver) -> None:
        """Start nothing yet; ``name`` is HOST:DEVICE."""
        super().__init__(config, store, name, passed_over)
        self.host, _, self.there = name.partition(":")  # the machine, and its own name of the device
        self.hello: messages.Hello | None = None  # its last one
        self.hello_at: str | None = None
        self.unknown = True  # it is to be greeted although no job waits
        self.drained = False
        self._asked = False  # it is to be greeted although it is drained
        self._unreachable: str | None = None  # why no bridge is tried
        self._lost: str | None = None  # why the last one has ended, until another one greets
        self._losses = 0  # in a row
        self._began = 0.0  # when the job that is computed was sent there, on the monotonic clock
        self._again = 0.0  # when it is greeted again, on the monotonic clock
        self._look_again = math.inf  # when it is asked for its models again

    @property
    def greeted(self) -> bool:
        """Whether the card can begin a job."""
        return self.worker is not None and self.worker.hello is not None

    @property
    def greeting(self) -> bool:
        """Whether a bridge is under way to it."""
        return self.worker is not None and self.worker.hello is None

    @property
    def asked_now(self) -> bool:
        """Whether it will say in a moment what it has."""
        return self.hello is None and self._lost is None and self._may_be_reached

    @property
    def free(self) -> bool:
        """Whether the device can begin a job."""
        return super().free and self.greeted and not self.drained and self._unreachable is None

    @property
    def due(self) -> float:
        """When it has something to do that no message tells, on the monotonic clock."""
        if self.greeting and self.worker is not None:
            return self.worker.idle_since + GREETING_SECONDS
        if self.worker is None and self._may_be_reached:
            return self._again if self.unknown else math.inf
        return self._look_again

    def look(self, now: float, unreachable: str | None, *, drained: bool, waits: bool) -> None:
        """Note how its machine is; once a round.

        Args:
            now: on the monotonic clock.
            unreachable: why the machine does not answer; None if it does.
            drained: whether it is to get no more jobs.
            waits: whether a job waits for any card.
        """
        if self._unreachable is not None and unreachable is None:
            self._again, self.unknown = 0.0, True  # it is back
        if self._unreachable is None and unreachable is not None and self.hello_at is not None:
            log.warning("%s is out of reach: %s", self.asked, unreachable)
        self._unreachable, self.drained = unreachable, drained
        if self.greeting and now >= self.due:
            assert self.worker is not None, "a bridge that greets runs"
            self._lose(self.worker, f"it does not answer within {GREETING_SECONDS:.0f} s")
        if drained and self.greeted and not self.busy:
            self.end_worker()  # whoever drained it wants the card free
        self._note_models(now, waits=waits)
        self.away = self._why_away()
        self.passed_over.device_away(self, self.asked if self.away else None)

    def _note_models(self, now: float, *, waits: bool) -> None:
        model = self.passed_over.lacking(self) if waits and self.greeted and not self.busy else None
        self.lacking = None
        self._look_again = math.inf if model is None else min(self._look_again, now + LOOK_AGAIN_SECONDS)
        if model is not None:
            self.lacking = f"{self.host} lacks the model {model}: framepackd models download {model} there"
            if now >= self._look_again:
                self.ask_again()

    def _why_away(self) -> str | None:
        if self.drained:
            return f"drained: framepackd nodes undrain {self.host} has it work again"
        if self.greeted:
            return None
        return self._unreachable or self._lost

    @property
    def _may_be_reached(self) -> bool:
        return (self._asked or not self.drained) and self._unreachable is None

    def is_wanted(self, now: float, place: int | None) -> bool:
        """Say whether to greet it now: nothing is known of it, or a job waits behind ``place`` others.

        ``place``: None if no job waits.
        """
        if self.worker is not None or not self._may_be_reached or now < self._again:
            return False
        return self.unknown or (place is not None and self.next_job(place) is not None)

    def greet(self) -> None:
        """Start a bridge to it."""
        try:
            self.worker = process.start_bridge(self.config, self.host, self.there)
        except OSError as error:  # no memory for a process, or too many of them
            self._wait(f"its bridge cannot be started: {error}")

    def ask_again(self) -> None:
        """Greet it anew as soon as may be, unless it works: its versions and models may be others now."""
        if self.worker is not None and not self.busy:
            self.end_worker()
        if self.worker is None:
            self.hello = self._lost = self.lacking = None
            self.unknown = self._asked = True
            self._again, self._look_again = 0.0, math.inf

    def start(self, job: Job) -> None:
        """Start a job of the queue; the device has to be free."""
        self._began = time.monotonic()
        super().start(job)
        if self.job is not None:
            log.info("job %s: it runs on %s", job.id, self.asked)

    def work_of(self, job: Job) -> messages.Work:
        """Describe a job for the worker there.

        Raises:
            KeyError, ValueError: its settings do not fit the configuration any more.
        """
        device = "cpu" if self.there.startswith("cpu") else self.there
        return replace(super().work_of(job), device=device, mirrored=True)

    def tell_next(self, place: int, job_id: str | None) -> None:
        """Tell nothing: the inputs of a job travel with it."""

    def end_worker(self) -> None:
        """End the bridge, and the worker on the other machine with it: that frees the card's memory."""
        if self.worker is not None and self.worker.busy:  # it writes the video of one job beside that
            self._lose(self.worker, "another job needs a new bridge")
        if self.worker is not None:
            self.worker.process.kill()  # an idle one has nothing to lose, and may wait for the network
            self.worker.process.join()
            self.worker.connection.close()
            self.worker = None

    def _hear(self, running: process.Handle, message: messages.Message | None) -> None:
        job = running.job
        match message:
            case messages.Hello():
                self._note_hello(running, message)
            case messages.Lost():
                self._lose(running, message.reason)
            case messages.Died():
                running.died = f"on {self.asked} {message.manner}"
                self._end_bridge(running)
            case messages.Ready() if running.busy:
                super()._hear(running, message)
            case messages.Written() if running.writing is not None:
                super()._hear(running, message)
            case _ if job is None or isinstance(message, messages.Ready | messages.Written):
                log.warning(
                    "%s reports on a job that it does not have: %s", self.asked, type(message).__name__
                )
            case _ if not _is_possible(job, message, time.monotonic() - self._began + SLACK_SECONDS):
                self._lose(running, f"it reports what cannot be of job {job.id}: {message}")
            case _:
                if isinstance(message, messages.StepDone):
                    self._losses = 0
                super()._hear(running, message)

    def _note_hello(self, running: process.Handle, hello: messages.Hello) -> None:
        running.hello, self.hello, self._asked = hello, hello, False
        running.idle_since = time.monotonic()
        self.hello_at, self.hardware, self.unknown, self._lost = utc_now(), hello.hardware, False, None
        self._store.remember_card(self.asked, hello.card)
        self.passed_over.device_found(self, hello.card)
        self.passed_over.device_has(self, hello.models)
        log.info("%s is reached: %s", self.asked, hello.hardware)

    def _note_device(self, running: process.Handle, found: messages.Ready) -> None:
        self.hardware, running.loaded = found.hardware, running.model
        self.passed_over.device_found(self, found.card)
        if running.job is not None:
            self.passed_over.began(running.job.id, found.card)

    def _lose(self, running: process.Handle, reason: str) -> None:
        running.lost = f"on {self.asked} was lost: {reason}"
        self._end_bridge(running)

    def _end_bridge(self, running: process.Handle) -> None:
        running.process.kill()
        running.process.join()
        self._bury(running)

    def _bury(self, running: process.Handle) -> None:
        """Record what the end of a bridge means for the jobs there, and when to try another one."""
        if not (running.lost or running.died or running.hung or running.ended):
            how = running.manner_of_death()
            if (running.process.exitcode or 0) < 0:
                running.lost = f"on {self.asked} was lost: its bridge on this machine {how}"
            else:  # it failed by itself, and perhaps on this job: that is not tried for ever
                running.died = f"on {self.asked} was lost: its bridge on this machine {how}"
        idle = not running.busy
        super()._bury(running)
        self.unknown = True
        if running.lost is not None or idle:
            self._wait(running.manner_of_death().removeprefix(f"on {self.asked} was lost: "))

    def _wait(self, reason: str) -> None:
        """Note why the card is out of reach, and when to try it again."""
        seconds = wait_after(self._losses)
        self._losses += 1
        self._again = time.monotonic() + seconds
        self._lost = f"{reason}; tried again after {seconds:.0f} s"
        log.warning("%s: %s", self.asked, self._lost)


def wait_after(losses: int) -> float:
    """Give the seconds before a card is greeted again that was lost so often in a row before."""
    doublings = min(losses, 10)  # a machine may be of no use for months
    return min(math.ldexp(FIRST_WAIT_SECONDS, doublings), LONGEST_WAIT_SECONDS)


def _is_possible(job: Job, message: messages.Message | None, seconds: float) -> bool:
    """Say whether what a worker reports can be true of a job that it has had for so long.

    The numbers are used to count, and to say when the queue will be done.
    """
    match message:
        case messages.StepDone():
            fits = 1 <= message.section <= job.sections and 1 <= message.step <= job.steps
            return fits and 0.0 <= message.seconds <= seconds
        case messages.SectionDecoded():
            return 1 <= message.section <= job.sections and 0.0 <= message.seconds <= seconds
        case messages.Resumed():
            clips = message.clips or (message.steps,)
            fits = len(clips) == job.clips or not message.clips
            return fits and min(clips) >= 0 and 0 <= message.steps <= job.steps_total
    return True
