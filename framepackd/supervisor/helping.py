"""Has a device that the queue does not need make clips of a job that another device computes.

It is no run of the job: whatever ends it, the job loses nothing, and its own worker makes the clips that are
left. That worker alone joins the video.
"""

import contextlib
import logging
import time
from dataclasses import replace

from framepackd.jobs.job import Job
from framepackd.jobs.store import JobStore
from framepackd.supervisor import progress
from framepackd.supervisor.process import Handle
from framepackd.worker import messages

log = logging.getLogger(__name__)


class Helping:
    """What the worker of one device makes for those of others."""

    def __init__(self, store: JobStore) -> None:
        """Help with nothing yet."""
        self._store = store
        self._owner: Handle | None = None  # the worker that computes the job
        self._left = False  # ours was told to leave
        self._enough: set[tuple[str, int]] = set()  # runs of jobs with which this device helps no more

    def is_wanted(self, owner: Handle, at_work: int) -> bool:
        """Say whether a worker computes a chain of which more clips are left than workers are ``at_work``."""
        job = owner.job
        if job is None or job.cancel or _run(job) in self._enough or owner.stop_sent is not None:
            return False
        left = sum(steps < job.steps_total // job.clips for steps in owner.clips)
        return owner.awaited != "start" and left > at_work  # it has done a step: the job can run

    def begin(self, running: Handle, owner: Handle, work: messages.Work) -> None:
        """Have an idle worker make clips of the job that the ``owner`` computes."""
        self._owner, self._left = owner, False
        running.begin(work.spec.name)
        running.helps = owner.job
        log.info("job %s: another device makes clips of it too", work.job_id)
        with contextlib.suppress(OSError):  # it died just now: that is noticed
            running.connection.send(replace(work, helps=True))

    def is_in_vain(self, running: Handle) -> bool:
        """Say whether the job is not computed any more, or is to be left."""
        owner = self._owner
        return owner is None or owner.job is not running.helps or owner.stop_sent is not None

    def leave(self, running: Handle) -> None:
        """Have the worker leave its clip at the next step."""
        if not self._left:
            self._left = True
            with contextlib.suppress(OSError):
                running.connection.send(messages.Leave())

    def hear(self, running: Handle, message: messages.Message | None) -> None:
        """Record what the worker has made, or why it helps no more."""
        job, owner = running.helps, self._owner
        assert job is not None, "the worker reports only on its job"
        made = isinstance(message, messages.StepDone | messages.SectionDecoded)
        if made and (owner is None or owner.job is not job):
            return  # it is counted when the job resumes
        if progress.record(running, job, message, self._store, owner):
            return
        match message:
            case messages.Failed():
                self.end(running, message.error)
            case messages.Blocked() | messages.Waits() | messages.Again():
                self.end(running, message.reason)
            case messages.Helped():
                self.end(running, "none is left")
            case _:
                self.end(running)

    def end(self, running: Handle, why: str | None = None) -> None:
        """Note that the worker helps no more; ``why`` if it cannot help with this job again."""
        job, running.helps, self._owner = running.helps, None, None
        running.idle_since = time.monotonic()
        if job is not None and why is not None:
            self.refuse(job, why)

    def refuse(self, job: Job, why: str) -> None:
        """Help with a job no more, until it is started again."""
        self._enough.add(_run(job))
        log.info("job %s: another device makes no more clips of it: %s", job.id, why)


def _run(job: Job) -> tuple[str, int]:
    return job.id, job.resumes
