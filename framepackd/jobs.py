"""The queue of jobs. Each change of a job's state is one statement in one transaction.

The daemon alone writes.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from framepackd.database import ENDED, Job, State, StoreError, explained, open_database, utc_now

STALLED_DEATHS = 5  # daemons that died in a row under a job that finished no step


class JobStore:
    """The queue. Threads may share it: each call has a connection and a transaction of its own."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the database, and create it if it is not there.

        Raises:
            StoreError: it is damaged, somebody else's, of a newer version, or cannot be opened.
        """
        self.path = path
        self._engine = open_database(path, read_only=read_only)

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with explained(self.path), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    # intake

    def add(self, job: Job) -> Job:
        """Record a new job, at the back of the queue."""
        with self._session() as session:
            job.position = 1 + (session.scalar(select(func.max(Job.position))) or 0)
            job.history = [_entry(State(job.state), "taken in")]
            session.add(job)
        return job

    def find_done(self, fingerprint: str) -> Job | None:
        """Give the latest finished job with the same pictures, prompt and settings."""
        with self._session() as session:
            same = select(Job).where(Job.fingerprint == fingerprint, Job.state == State.DONE)
            return session.scalars(same.order_by(Job.seq.desc())).first()

    # a job's life

    def claim(self) -> Job | None:
        """Start the next queued job."""
        following = (
            select(Job.seq)
            .where(Job.state == State.QUEUED, Job.delivery.is_(None))
            .order_by(Job.position)
            .limit(1)
            .scalar_subquery()
        )
        statement = (
            update(Job)
            .where(Job.seq == following)
            .values(
                state=State.RUNNING,
                resumes=Job.resumes + func.iif(Job.started_at.is_(None), 0, 1),
                started_at=func.coalesce(Job.started_at, utc_now()),
                history=_with_entry(State.RUNNING, "started"),
            )
            .returning(Job)
        )
        with self._session() as session:
            return session.scalars(statement).one_or_none()

    def resumed(self, job_id: str, *, steps: int) -> None:
        """Note how many steps of a job were found done when it was started, of all its sections."""
        job = self.get(job_id)
        recorded = max(job.section - 1, 0) * job.steps + job.step
        section = (steps - 1) // job.steps + 1 if steps else 0
        self._set_running(
            job_id,
            section=section,
            step=steps - max(section - 1, 0) * job.steps,
            # The last step before a crash may have become durable without having been told of.
            steps_run=Job.steps_run + max(steps - recorded, 0),
        )

    def step(self, job_id: str, *, section: int, step: int, seconds: float) -> None:
        """Count a finished sampling step; ``section`` from 1."""
        self._set_running(
            job_id,
            section=section,
            step=step,
            steps_run=Job.steps_run + 1,
            # The first step warms everything up and would spoil the estimate: the second replaces it.
            step_seconds=seconds if (section, step) == (1, 2) else _smoothed(Job.step_seconds, seconds),
            stalled_deaths=0,
        )

    def decoded(self, job_id: str, *, seconds: float) -> None:
        """Note how long a section took to decode."""
        self._set_running(job_id, decode_seconds=_smoothed(Job.decode_seconds, seconds))

    def decide(
        self,
        job_id: str,
        state: State,
        *,
        error: str | None = None,
        **made: Any,
    ) -> None:
        """Write down how a job ends, before anything is moved; the delivery can then be taken up again.

        ``made``: columns that say how it was made: timings, versions, device ...
        """
        values = {"delivery": {"state": state, "error": error}, **made}
        with self._session() as session:
            session.execute(update(Job).where(Job.id == job_id, Job.state.not_in(ENDED)).values(**values))

    def finish(self, job_id: str, state: State, *, error: str | None, output: str | None) -> None:
        """End a job whose files are all in their place."""
        values = {"delivery": None, "error": error, "output": output, "finished_at": utc_now()}
        self._move(job_id, state, error or "delivered", **values)

    def requeue(self, job_id: str, note: str) -> None:
        """Put a running job back; it was interrupted, which is not its fault."""
        self._move(job_id, State.QUEUED, note)

    def count_attempt(self, job_id: str, note: str) -> int:
        """Put a running job back after its worker died or failed on it; says how often that was."""
        self._move(job_id, State.QUEUED, note, attempts=Job.attempts + 1)
        return self.get(job_id).attempts

    def recover(self) -> list[Job]:
        """Put back what a daemon that died left running; only for the holder of the lock."""
        with self._session() as session:
            left = list(
                session.scalars(select(Job).where(Job.state == State.RUNNING, Job.delivery.is_(None)))
            )
            last = session.scalar(select(func.max(Job.position))) or 0
        for job in left:
            deaths = job.stalled_deaths + 1
            back = {"position": last + 1} if deaths >= STALLED_DEATHS else {}
            note = "the daemon ended while it ran" + (f" ({deaths} times without a step)" if back else "")
            self._move(job.id, State.QUEUED, note, stalled_deaths=deaths, **back)
        return left

    def _move(self, job_id: str, state: State, note: str, **values: Any) -> None:
        statement = (
            update(Job)
            .where(Job.id == job_id, Job.state.not_in(ENDED))
            .values(state=state, history=_with_entry(state, note), **values)
        )
        with self._session() as session:
            if session.execute(statement).rowcount != 1:  # type: ignore[attr-defined] # typed as Result
                raise StoreError(f"job {job_id} has ended already and cannot become {state}")

    def _set_running(self, job_id: str, **values: Any) -> None:
        statement = update(Job).where(Job.id == job_id, Job.state == State.RUNNING)
        with self._session() as session:
            session.execute(statement.values(progress_at=utc_now(), **values))

    # looking

    def get(self, job_id: str) -> Job:
        """Give a job by its id.

        Raises:
            KeyError: there is none.
        """
        with self._session() as session:
            job = session.scalars(select(Job).where(Job.id == job_id)).one_or_none()
        if job is None:
            raise KeyError(job_id)
        return job

    def find(self, wanted: str) -> Job | None:
        """Find a job by its id, by its name, or by the start of its id; of several the latest."""
        matching = (Job.id == wanted, Job.name == wanted, Job.id.startswith(wanted, autoescape=True))
        with self._session() as session:
            for condition in matching:
                job = session.scalars(select(Job).where(condition).order_by(Job.seq.desc())).first()
                if job is not None:
                    return job
        folder, _, name = wanted.rpartition("/")
        return self.latest(folder, name) if folder else None

    def latest(self, folder: str, name: str) -> Job | None:
        """Give the latest job taken from a folder under a name."""
        with self._session() as session:
            same = select(Job).where(Job.folder == folder, Job.name == name)
            return session.scalars(same.order_by(Job.seq.desc())).first()

    def has_queued(self) -> bool:
        """Say whether there is a job to claim."""
        waiting = select(Job.seq).where(Job.state == State.QUEUED, Job.delivery.is_(None))
        with self._session() as session:
            return session.scalars(waiting.limit(1)).first() is not None

    def in_state(self, *states: State, limit: int | None = None, latest_first: bool = False) -> list[Job]:
        """List jobs by state, in the order of the queue, or the last finished first."""
        order = (Job.finished_at.desc(), Job.seq.desc()) if latest_first else (Job.position,)
        with self._session() as session:
            return list(
                session.scalars(select(Job).where(Job.state.in_(states)).order_by(*order).limit(limit))
            )

    def undelivered(self) -> list[Job]:
        """List the jobs whose end is decided and whose files are still to be moved."""
        with self._session() as session:
            return list(session.scalars(select(Job).where(Job.delivery.is_not(None)).order_by(Job.position)))

    def counts(self) -> dict[str, int]:
        """Count the jobs in each state."""
        with self._session() as session:
            rows = session.execute(select(Job.state, func.count()).group_by(Job.state)).all()
        found = {row[0]: row[1] for row in rows}
        return {state.value: found.get(state.value, 0) for state in State}

    def states(self) -> dict[str, str]:
        """Give the state of every job, by id."""
        with self._session() as session:
            return {row[0]: row[1] for row in session.execute(select(Job.id, Job.state))}


def _entry(state: State, note: str) -> dict[str, str]:
    return {"at": utc_now(), "state": state.value, "note": note}


def _with_entry(state: State, note: str) -> Any:
    return func.json_insert(Job.history, "$[#]", func.json(json.dumps(_entry(state, note))))


def _smoothed(column: Any, seconds: float) -> Any:
    return func.coalesce(column + (seconds - column) * 0.2, seconds)
