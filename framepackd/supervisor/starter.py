"""Starts the next job of a device, unless something is missing: its model, room on a disk, the device."""

import logging
import math
from collections.abc import Callable, Sequence

from framepackd.jobs.job import Job
from framepackd.settings.config import Config
from framepackd.supervisor.device_faults import RETRY_SECONDS
from framepackd.supervisor.readiness import missing_model
from framepackd.supervisor.supervisor import Supervisor

log = logging.getLogger(__name__)

Obstacle = Callable[[Job, Config, Sequence[Job]], str | None]  # says what a job lacks beside those that run


class Starter:
    """Starts one job after the other on a device, and knows why it waits."""

    def __init__(
        self, supervisor: Supervisor, obstacles: tuple[Obstacle, ...], running: Callable[[], Sequence[Job]]
    ) -> None:
        """Start nothing yet; each of ``obstacles`` is asked before a job starts beside ``running`` ones."""
        self._running = running
        self.obstacles = obstacles
        self.held: str | None = None  # why the next job is not started
        self.again = 0.0  # when that is checked again, on the monotonic clock
        self.supervisor = supervisor

    @property
    def due(self) -> float:
        """When the next round has something to do, on the monotonic clock."""
        return math.inf if self.held is None else self.again

    def start_next(self, now: float) -> bool:
        """Start the next job, unless something it needs is missing; says whether one failed at once."""
        supervisor = self.supervisor
        job = supervisor.next_job()
        passed_over = supervisor.passed_over.why(supervisor.config) or supervisor.lacking
        if job is None:
            self.held = passed_over
            self.again = now + RETRY_SECONDS if passed_over else self.again
            return False
        if now < self.again and self.held not in (None, passed_over):
            return False
        held = supervisor.faults.take_block()
        if job.cancel is None:  # else only what exists is written
            asked = (obstacle for obstacle in self.obstacles if not self._is_loaded(job, obstacle))
            reasons = (obstacle(job, supervisor.config, self._running()) for obstacle in asked)
            held = held or next(filter(None, reasons), None)
        if held is None:
            try:
                supervisor.start(job)
            except OSError as error:  # no memory for a process, or too many of them
                held = f"the worker cannot be started: {error}"
            else:
                self.held = None
                return supervisor.job is None
        if held != self.held:
            log.warning("the queue waits: %s", held)
        self.held, self.again = held, now + supervisor.faults.patience
        return False

    def _is_loaded(self, job: Job, obstacle: Obstacle) -> bool:
        """Say whether this looks for the files of a model that is loaded; each look takes a while."""
        return obstacle is missing_model and self.supervisor.loaded == job.settings.get("model")
