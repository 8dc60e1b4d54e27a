"""Runs a supervisor for each device, here and on other machines; has the free ones start the next jobs."""

import math
import time
from collections.abc import Callable
from heapq import nsmallest
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from framepack_core.memory import before_torch
from framepackd.jobs.job import Job
from framepackd.jobs.report import DeviceReport
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.settings.config import Config
from framepackd.supervisor.passed_over import PassedOver
from framepackd.supervisor.readiness import missing_model
from framepackd.supervisor.starter import Obstacle, Starter
from framepackd.supervisor.supervisor import CANCELLING, Supervisor

if TYPE_CHECKING:
    from framepackd.supervisor.fleet import Fleet

TOLD = 8  # devices that know their next job; more would cost each start the time that it takes to tell them
START_SECONDS = 0.2  # at most, to start jobs before the devices that compute already are heard again


class Cards:
    """All devices that compute, in the order of the configuration."""

    def __init__(
        self,
        config: Config,
        store: JobStore,
        obstacles: tuple[Obstacle, ...],
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """Start nothing yet; each of ``obstacles`` is asked before a job starts.

        ``wake`` has the next round begin: it is called when other machines come and go.
        """
        self.config = config
        self._store = store
        self._free_left = False  # the last round had no time to start jobs on all free devices
        self.passed_over = PassedOver(store, config.gpu.move_after)
        self.local = [Supervisor(config, store, name, self.passed_over) for name in config.gpu.devices]
        self.each: list[Supervisor] = []  # those of other machines are the last
        self.starters: list[Starter] = []
        for supervisor in self.local:
            self._add(supervisor, obstacles)
            if len(self.local) > 1 or config.cluster.nodes:
                # A job waits for its card from the start, not once a worker has reported it.
                card = before_torch.card_name(supervisor.asked)
                if card is not None:
                    self.passed_over.device_found(supervisor, card)
        self.fleet = self._other_machines(store, obstacles, wake) if config.cluster.nodes else None

    def _add(self, supervisor: Supervisor, obstacles: tuple[Obstacle, ...]) -> None:
        self.each.append(supervisor)
        self.starters.append(Starter(supervisor, obstacles, lambda: self.jobs))

    def _other_machines(
        self, store: JobStore, obstacles: tuple[Obstacle, ...], wake: Callable[[], None]
    ) -> "Fleet":
        from framepackd.supervisor.fleet import (
            Fleet,  # who computes on this machine alone needs nothing of it
        )

        # Which models they have they say: jobs that ask for others are not theirs.
        theirs = tuple(obstacle for obstacle in obstacles if obstacle is not missing_model)
        return Fleet(self.config, store, self.passed_over, lambda card: self._add(card, theirs), wake)

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return any(supervisor.busy for supervisor in self.each)

    @property
    def jobs(self) -> list[Job]:
        """The running jobs."""
        return [job for supervisor in self.each for job in supervisor.jobs]

    @property
    def running(self) -> list[str]:
        """The ids of the running jobs."""
        return [job.id for job in self.jobs]

    @property
    def helped(self) -> frozenset[str]:
        """The ids of the jobs in whose work folders workers still are that only help with them."""
        helps = (supervisor.worker.helps for supervisor in self.each if supervisor.worker is not None)
        return frozenset(job.id for job in helps if job is not None)

    @property
    def sources(self) -> list[Connection | int]:
        """What becomes readable when a worker has sent a message or died."""
        return [source for supervisor in self.each for source in supervisor.sources]

    @property
    def held(self) -> str | None:
        """Why no job is started; None if nothing is in the way of a device."""
        reasons = [_held(starter) for starter in self.starters]
        if not reasons and self.fleet is not None:
            return self.fleet.held
        return reasons[0] if all(reasons) else None

    @property
    def due(self) -> float:
        """When a device has something to do, on the monotonic clock."""
        if self._free_left:
            return 0.0
        starts = (starter.due for starter in self.starters)
        unloads = (supervisor.unload_at for supervisor in self.each)
        return min(math.inf, math.inf if self.fleet is None else self.fleet.due, *starts, *unloads)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What a person should put right before all jobs can run."""
        others = () if self.fleet is None else self.fleet.problems
        return *self.passed_over.problems(self.config), *others

    @property
    def names(self) -> str:
        """The devices in one line."""
        return ", ".join(supervisor.device for supervisor in self.each)

    @property
    def hardware(self) -> str | None:
        """The devices in words, as far as their workers have reported them."""
        return "; ".join(supervisor.hardware for supervisor in self.each if supervisor.hardware) or None

    def reports(self) -> list[DeviceReport]:
        """Give what ``status --json`` prints of each device."""
        return [_report(starter.supervisor, _held(starter)) for starter in self.starters]

    def reconfigure(self, config: Config) -> None:
        """Use another configuration from now on; the devices stay."""
        self.config = config
        for supervisor in self.each:
            supervisor.config = config

    def listen(self) -> None:
        """Record what the workers report, and notice which hang, died or are idle for too long."""
        if self.fleet is not None:
            self.fleet.meet()
        with self._store.together():
            for supervisor in self.each:
                supervisor.listen(1 / len(self.each))

    def tell_next(self) -> None:
        """Tell the workers which jobs they get next; not urgent, unlike to start one."""
        # The device that is free first gets the first job of the queue, the next one the second. The others
        # are told when their turn is near: each start moves all turns, and of many cards the most are far.
        # Those of other machines are not told: the inputs of a job travel with it.
        busy = [(running, each) for each in self.local if (running := each.worker) and running.job]
        soonest = nsmallest(TOLD, busy, key=lambda each: each[0].remains)
        ids = self.passed_over.next_ids([supervisor for _, supervisor in soonest])
        for place, ((_, supervisor), job_id) in enumerate(zip(soonest, ids, strict=True)):
            supervisor.tell_next(place, job_id)

    def leave(self, now: float, why: str) -> None:
        """Have all workers leave their jobs at the next step."""
        self._free_left = False
        if self.fleet is not None:
            self.fleet.rest()
        for starter in self.starters:
            starter.held = None
            starter.supervisor.leave(now, why)

    def steer(self, now: float) -> bool:
        """Start jobs on the free devices, have cancelled ones stop; says whether one failed at once."""
        failed, self._free_left = False, False
        until = time.monotonic() + START_SECONDS
        if self.fleet is not None:
            self.fleet.look(now)
        for starter in self._by_preference():
            if starter.supervisor.cancelling:
                starter.supervisor.leave(now, CANCELLING)
            elif not starter.supervisor.free:
                starter.held = None
            elif time.monotonic() > until:
                self._free_left = True
            elif not self._waits_for_helper(starter.supervisor):
                failed |= starter.start_next(now)
        self._share_clips()
        if self.fleet is not None:
            self.fleet.greet(now)  # last, for what no device has begun
        return failed

    def _waits_for_helper(self, supervisor: Supervisor) -> bool:
        """Say whether the next job resumes only once those who made clips of it have left them."""
        helped = self.helped
        job = supervisor.next_job() if helped else None
        return job is not None and job.id in helped

    def _share_clips(self) -> None:
        """Have devices that the queue does not need make clips of the chains that others compute.

        Those of other machines do not: clips are shared by way of the work folder and its locks.
        """
        for supervisor in self.local:
            running = supervisor.worker
            if running is not None and running.helps is not None:
                if supervisor.helping.is_in_vain(running) or supervisor.next_job() is not None:
                    supervisor.helping.leave(running)
            elif supervisor.free and supervisor.next_job() is None:
                self._help_another(supervisor)

    def _help_another(self, supervisor: Supervisor) -> None:
        card = self.passed_over.card_of(supervisor)
        for other in self.local:
            owner = other.worker
            if owner is None or owner.job is None:
                continue
            helpers = sum(w.helps is owner.job for each in self.each if (w := each.worker))
            if not supervisor.helping.is_wanted(owner, 1 + helpers):
                continue
            if card is not None and self.passed_over.card_of(other) == card:  # the bits depend on it
                supervisor.help(owner, owner.job)
                return

    def try_now(self) -> None:
        """Have the next round try again what kept jobs from starting."""
        for starter in self.starters:
            starter.again = 0.0

    def end_idle(self) -> None:
        """End the workers without a job, which frees the memory of their devices."""
        for supervisor in self.each:
            if not supervisor.busy:
                supervisor.end_worker()

    def end(self) -> None:
        """End all workers."""
        if self.fleet is not None:
            self.fleet.end()
        for supervisor in self.each:
            supervisor.end_worker()

    def kill(self) -> None:
        """End all workers at once; their jobs go back to the queue."""
        for supervisor in self.each:
            supervisor.kill()

    def runs(self, job_id: str) -> bool:
        """Say whether this job runs."""
        return job_id in self.running

    def cancel(self, job_id: str, how: str) -> None:
        """Note that a running job is cancelled, ``how`` as in its row."""
        for job in self.jobs:
            if job.id == job_id:
                job.cancel = how

    def _by_preference(self) -> list[Starter]:
        """Put those first whose card the next job began on, then those that have its model loaded."""
        if sum(supervisor.free for supervisor in self.each) < 2:
            return self.starters
        job = self.passed_over.next_job(self.config)
        model = job.settings.get("model") if job else None
        begun = self.passed_over.began_on(job.id) if job else None

        def misfits(starter: Starter) -> tuple[bool, bool]:
            supervisor = starter.supervisor
            other_card = begun is not None and self.passed_over.card_of(supervisor) != begun
            return other_card, supervisor.loaded != model

        return sorted(self.starters, key=misfits)


def _held(starter: Starter) -> str | None:
    """Say why a device begins no job, which may be that it is out of reach."""
    return starter.supervisor.away or starter.held


def _report(supervisor: Supervisor, held: str | None) -> DeviceReport:
    writing = supervisor.worker.writing if supervisor.worker else None
    helped = supervisor.worker.helps if supervisor.worker else None
    return {
        "name": supervisor.device,
        "card": supervisor.hardware,
        "job": next((job.id for job in supervisor.jobs), None),
        "finishing": writing.id if writing else None,
        "helps": helped.id if helped else None,
        "held": held,
    }
