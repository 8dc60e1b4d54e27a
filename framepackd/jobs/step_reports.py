"""Holds reports of finished steps until the next transaction: those of many cards share one, and its sync.

A step is a report, not a decision: the checkpoint is the truth, and a resume counts what no row has yet. So
it may be recorded a moment after it was heard, but never after what was heard later.
"""

import threading
from typing import Any

from sqlalchemy import bindparam, func, update
from sqlalchemy.orm import Session

from framepackd.jobs.job import Job, State, utc_now

SMOOTHING = 0.2  # the share of the newest step in the average

_SECONDS: Any = bindparam("seconds")
_SHARE: Any = bindparam("share")
_RECORD = (
    update(Job.__table__)  # type: ignore[arg-type] # it is a table
    .where(Job.id == bindparam("job"), Job.state == State.RUNNING)
    .values(
        section=bindparam("at_section"),
        step=bindparam("at_step"),
        steps_beyond=bindparam("beyond"),
        steps_run=Job.steps_run + 1,
        step_seconds=func.coalesce(Job.step_seconds + (_SECONDS - Job.step_seconds) * _SHARE, _SECONDS),
        stalled_deaths=0,
        progress_at=bindparam("at"),
    )
)


class StepReports(threading.local):
    """The reports that wait; each thread has its own, so that its next transaction writes them first."""

    def __init__(self) -> None:
        """Hold none, and record each at once."""
        self.waiting: list[dict[str, Any]] = []
        self.held = False  # more are to come before they are recorded

    def add(self, job_id: str, section: int, step: int, seconds: float, beyond: int) -> None:
        """Have a step recorded; arguments as of :meth:`JobStore.step`."""
        share = 1.0 if (section, step) == (1, 2) else SMOOTHING  # the first step includes the warm-up
        report = {"job": job_id, "at_section": section, "at_step": step, "beyond": beyond}
        self.waiting.append(report | {"seconds": seconds, "share": share, "at": utc_now()})

    def write(self, session: Session) -> int:
        """Write them all in the transaction of a session, in order; gives how many."""
        if self.waiting:
            session.connection().execute(_RECORD, self.waiting)
        return len(self.waiting)

    def forget(self, written: int) -> None:
        """Forget the first ones, which are durable."""
        del self.waiting[:written]
