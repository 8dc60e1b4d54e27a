"""Passes over jobs that cannot run just now, and says what a person can do about them."""

import logging
import math
import time
from collections.abc import Mapping

from framepackd.jobs.job import Job
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.settings.config import Config
from framepackd.supervisor import readiness
from framepackd.worker.other_device import Type, type_of

log = logging.getLogger(__name__)

FOLDERS_SECONDS = 10.0  # before the missing files of passed over jobs are looked for again


class PassedOver:
    """Chooses the next job, and knows which were passed over and why."""

    def __init__(self, store: JobStore) -> None:
        """Pass nothing over yet."""
        self._store = store
        self._without_files: dict[str, str] = {}  # by id: what to do
        self._of_other_device: dict[str, tuple[str, Type]] = {}  # and on which type they began
        self._folders_again = 0.0

    def next_job(self, config: Config) -> Job | None:
        """Give the job that runs next: the first in the queue that can."""
        if time.monotonic() >= self._folders_again:
            self._look_for_files(config)
        job = self._store.next_queued(self.reasons)
        if job is not None and not readiness.has_files(job.id, job.inputs, config):
            self._look_for_files(config)
            job = self._store.next_queued(self.reasons)
        return job

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why each passed over job, by id, cannot run, and what to do."""
        return {job: reason for job, (reason, _) in self._of_other_device.items()} | self._without_files

    def wait_for_device(self, job_id: str, reason: str, made_on: Type) -> None:
        """Pass over a job that began on the other type of device."""
        self._of_other_device[job_id] = reason, made_on

    def device_found(self, device: str) -> None:
        """Pass over no longer the jobs that began on this type of device."""
        for job_id, (_, made_on) in list(self._of_other_device.items()):
            if made_on == type_of(device):
                del self._of_other_device[job_id]

    def forget(self, job_id: str) -> None:
        """Pass over a job no longer: it was cancelled, or begins anew."""
        self._of_other_device.pop(job_id, None)

    def _look_for_files(self, config: Config) -> None:
        """Find the jobs without their files; log them if there are new ones."""
        before, self._without_files = self._without_files, readiness.without_files(self._store, config)
        self._folders_again = time.monotonic() + FOLDERS_SECONDS if self._without_files else math.inf
        problem = readiness.problem_without_files(self._without_files, config)
        if problem is not None and self._without_files.keys() - before.keys():
            log.warning("%s", problem.text)

    def problems(self, config: Config) -> tuple[Problem, ...]:
        """What a person should put right before all jobs can run."""
        found = (
            readiness.problem_without_files(self._without_files, config),
            readiness.problem_of_other_device({job: why for job, (why, _) in self._of_other_device.items()}),
        )
        return tuple(filter(None, found))
