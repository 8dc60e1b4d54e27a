"""Moves the files of jobs whose end is decided, in two threads: the daemon's loop waits for no disk.

One thread moves to the outbox, the other to and from the failed folder: if one hangs, the other still works.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

from framepackd import folders
from framepackd.apart import SILENT_SECONDS, Apart
from framepackd.delivery import deliver
from framepackd.files import moving
from framepackd.folders import FolderError, why
from framepackd.inbox.forgotten import left_in
from framepackd.jobs.described import described
from framepackd.jobs.job import Job, State
from framepackd.jobs.report import DeliveryReport
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.settings.config import Config

log = logging.getLogger(__name__)

RETRY_SECONDS = 30.0  # before a failed move is tried again
PATIENCE_SECONDS = 0.5  # a round waits this long for moves to end
HURRY_SECONDS = 0.02  # while jobs run: a device may need its next one
REACH_SECONDS = 5.0  # a command waits this long for the failed folder
WAYS = {key: [state for state in State if state.folder == key] for key in folders.MARKED}
Made = TypeVar("Made")


@dataclass(frozen=True)
class Obstacle:
    """Why files could not be moved, and when they are tried again on the monotonic clock."""

    reason: str
    again: float
    kind: str = ""  # the same for like obstacles of other jobs; empty: not to be logged


class _Way:
    """Moves to, or to and from, one folder, in a thread."""

    def __init__(self, key: str, wake: Callable[[], None]) -> None:
        self.key = key
        self.states = WAYS[key]
        self.apart: Apart[Any] = Apart(f"move-{key}", wake)
        self.job: Job | None = None  # whose files are being moved
        self.obstacle: Obstacle | None = None  # of the folder
        self.obstacles: dict[str, Obstacle] = {}  # of single jobs, by id
        self.logged: dict[str, int] = {}  # how many jobs had an obstacle of each kind when it was logged
        self.progress = moving.Progress()
        self.moved_at = 0.0  # when bytes were last moved, on the monotonic clock

    def begin(self, task: Callable[[], Any], job: Job | None = None) -> None:
        self.job, self.moved_at = job, time.monotonic()
        self.apart.begin(task)

    def again(self, job_id: str) -> float:
        """Give when a job's turn comes, on the monotonic clock; new jobs come first."""
        return self.obstacles[job_id].again if job_id in self.obstacles else -math.inf

    @property
    def due(self) -> float:
        """When the next try is due; a move that ends wakes the loop by itself."""
        if self.apart.busy:
            return math.inf
        if self.obstacle is not None:
            return self.obstacle.again
        return min((each.again for each in self.obstacles.values()), default=math.inf)

    @property
    def silent_seconds(self) -> float:
        """How long a move that is under way has moved no byte."""
        return min(self.apart.seconds, time.monotonic() - self.moved_at)


class Deliveries:
    """Moves files to the outbox and the failed folder, and keeps what prevents that."""

    def __init__(
        self,
        config: Config,
        store: JobStore,
        wake: Callable[[], None],
        stop: Callable[[], bool],
        bring_back: Callable[..., None],
    ) -> None:
        """Move nothing yet.

        Args:
            config: where to.
            store: the jobs.
            wake: called from the threads when a move has ended.
            stop: says whether a copy is to stop.
            bring_back: brings back the files of a job that is to run again, see :func:`settle`.
        """
        self.config = config
        self._store = store
        self._stop = stop
        self._bring_back = bring_back
        self._ways = {key: _Way(key, wake) for key in WAYS}
        self._left: dict[str, tuple[Problem, ...]] = {}  # files in a folder that belong to no job
        self._unfinished = False
        self._ended = False
        self.failed = False  # a job has failed, or could not be delivered

    @property
    def busy(self) -> bool:
        """Whether anything is being moved."""
        return any(way.apart.busy for way in self._ways.values())

    @property
    def due(self) -> float:
        """When the next round has something to do, on the monotonic clock."""
        if self._unfinished:
            return 0.0
        return min(way.due for way in self._ways.values())

    def look_for_leftovers(self) -> None:
        """Look for unfinished copies of unknown jobs in both folders; for the start."""
        for way in self._ways.values():
            way.begin(partial(self._look_through, way.key))

    def _look_through(self, key: str) -> None:
        with folders.opened(key, self.config):
            self._left[key] = tuple(left_in(getattr(self.config, key), self._store))

    def round(self, *, hurry: bool = False, spared: Collection[str] = ()) -> bool:
        """Collect the moves that have ended and begin the next; says whether a job has ended.

        ``spared``: ids of jobs whose files are still in use.
        """
        until = time.monotonic() + (HURRY_SECONDS if hurry else PATIENCE_SECONDS)
        self._unfinished = False
        for way in self._ways.values():
            self._collect(way)
            if not way.apart.busy:
                self._move_some(way, until, spared)
        ended, self._ended = self._ended, False
        return ended

    def _move_some(self, way: _Way, until: float, spared: Collection[str]) -> None:
        """Move the files of one job after the other, and log what cannot be moved."""
        now = time.monotonic()
        if way.obstacle is not None and now < way.obstacle.again:
            return
        waiting = self._store.to_deliver(way.states)  # one query: there may be thousands
        way.obstacles = {job_id: way.obstacles[job_id] for job_id in waiting if job_id in way.obstacles}
        if way.obstacle is not None and not waiting:
            way.begin(partial(self._look_through, way.key))  # to see whether the folder is usable again
            return
        # New jobs first, then those that have waited longest: no job holds up the others.
        for job_id in sorted((each for each in waiting if each not in spared), key=way.again):
            if way.again(job_id) > now:
                break
            if time.monotonic() >= until:
                self._unfinished = True
                return
            job = self._store.get(job_id)
            way.begin(self._moving(way, job), job)
            self._collect(way, max(until - time.monotonic(), 0.0))
            if way.apart.busy:
                return
            if way.obstacle is not None:
                break
        self._log(way)

    def _log(self, way: _Way) -> None:
        """Log the obstacles: one line for each kind, however many jobs have it."""
        stuck: dict[str, list[str]] = defaultdict(list)
        for job_id, each in way.obstacles.items():
            if each.kind:
                stuck[each.kind].append(job_id)
        for kind, jobs in stuck.items():
            if len(jobs) <= way.logged.get(kind, 0) or (way.obstacle is not None and kind in way.logged):
                continue
            whose = f"job {jobs[0]}: its files cannot be moved"
            if len(jobs) > 1:
                whose = f"the files of {len(jobs)} jobs cannot be moved, those of job {jobs[0]}"
            reason = way.obstacles[jobs[0]].reason
            log.error("%s: %s: tried again every %.0f s", whose, reason, RETRY_SECONDS)
        way.logged = {kind: len(jobs) for kind, jobs in stuck.items()}

    def _moving(self, way: _Way, job: Job) -> Callable[[], None]:
        def stop() -> bool:  # a copy asks between two blocks, which shows that bytes move
            way.moved_at = time.monotonic()
            return self._stop()

        way.progress = moving.Progress(stop=stop)
        return partial(settle, job, self.config, self._store, self._bring_back, progress=way.progress)

    def retry_now(self) -> None:
        """Try everything again in the next round."""
        for way in self._ways.values():
            way.obstacle = None
            way.obstacles = {  # in the same order
                job_id: replace(each, again=each.again - RETRY_SECONDS)
                for job_id, each in way.obstacles.items()
            }

    def _collect(self, way: _Way, patience: float = 0.0) -> None:
        """Take the outcome of a move, if it has ended."""
        if not way.apart.is_done(patience):
            return
        job, way.job = way.job, None
        try:
            way.apart.take()
        except moving.StoppedError:
            if job is not None:  # the next daemon resumes it
                way.obstacles[job.id] = Obstacle("stopped with the daemon", math.inf)
            return
        except OSError as error:
            self._note_failure(way, job, error)
            return
        way.obstacle = None
        if job is not None:
            way.obstacles.pop(job.id, None)
            self._ended = True
            self.failed |= job.delivery is not None and job.delivery["state"] == State.FAILED

    def _note_failure(self, way: _Way, job: Job | None, error: OSError) -> None:
        reason, for_all = why(error, way.key, self.config)
        obstacle = Obstacle(reason, time.monotonic() + RETRY_SECONDS, error.strerror or reason)
        if job is not None:
            way.obstacles[job.id] = obstacle
            self.failed = True  # for --once, which does not try again
        elif way.obstacle is None:
            log.error("files cannot be moved: %s: tried again every %.0f s", reason, RETRY_SECONDS)
        if for_all:
            way.obstacle = obstacle

    # for commands and status

    def at_failed(self, task: Callable[[], Made]) -> Made:
        """Run a task on the failed folder, as ``at``."""
        return self.at("failed", task)

    def at(self, folder: Literal["outbox", "failed"], task: Callable[[], Made]) -> Made:
        """Run a task on a folder in that folder's thread, and wait up to REACH_SECONDS.

        Raises:
            OSError: it takes longer, or the folder is busy or cannot be used.
        """
        way, path = self._ways[folder], getattr(self.config, folder)
        if way.apart.busy:
            way.apart.is_done(REACH_SECONDS)
            self._collect(way)
        if way.apart.busy:
            raise FolderError(path, "is busy with other files: try again in a moment")
        way.begin(task)
        if not way.apart.is_done(REACH_SECONDS):
            raise FolderError(path, "has not answered yet: what was begun continues")
        made: Made = way.apart.take()
        return made

    def is_moving(self, job_id: str) -> bool:
        """Say whether the files of a job are being moved right now."""
        return any(way.job is not None and way.job.id == job_id for way in self._ways.values())

    def of(self, job: Job) -> DeliveryReport | None:
        """Report how the files of a job stand; None for a job whose end is not decided."""
        if job.delivery is None:
            return None
        way = self._ways[State(job.delivery["state"]).folder]
        if self.is_moving(job.id):
            return described(job, moved=way.progress)
        obstacle = way.obstacle or way.obstacles.get(job.id)
        return described(job, obstacle.reason, obstacle.again) if obstacle else described(job)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Which folders cannot be used or do not answer, and what lies in them that belongs to no job."""
        found = []
        for way in self._ways.values():
            folder = getattr(self.config, way.key)
            if way.silent_seconds > SILENT_SECONDS:
                since = f"{way.key} {folder} has not answered for {way.silent_seconds:.0f} s"
                found.append(Problem(way.key, f"{since}: look after its disk or its connection"))
            elif way.obstacle is not None:
                found.append(Problem(way.key, way.obstacle.reason))
            found += self._left.get(way.key, ())
        return tuple(found)


def settle(
    job: Job,
    config: Config,
    store: JobStore,
    bring_back: Callable[..., None],
    *,
    progress: moving.Progress | None = None,
) -> None:
    """Move the files of a job whose end is decided, or bring them back if it is to run again.

    ``bring_back`` takes the same as :func:`framepackd.delivery.deliver.deliver`.

    Raises:
        StoppedError: ``progress.stop`` said so; the next call resumes.
        OSError: that cannot be done now; nothing is lost, try again later.
    """
    assert job.delivery is not None
    with folders.opened(State(job.delivery["state"]).folder, config):
        if job.delivery["state"] == State.QUEUED:
            bring_back(job, config, store, progress=progress)
        else:
            deliver.deliver(job, config, store, progress=progress)
