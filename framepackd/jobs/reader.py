"""Queries the jobs without changing any, for status, commands and the page."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Engine, Select, String, cast, func, select
from sqlalchemy.orm import Session, aliased

from framepackd.jobs.database import explained
from framepackd.jobs.job import Input, Job, MemoryLevel, Meta, State
from framepackd.jobs.job_sql import IN_ORDER, RUNNABLE, TAKEN_AS, following, starts_with, variation_of
from framepackd.text import LAST

# Select is quoted: SQLAlchemy 2.0 and 2.1 give it other parameters.
Value = TypeVar("Value")


UNCOMPILED = "uncompiled|"  # a key of the table meta, followed by the conditions under which compiling fails


class JobReader:
    """Reads the jobs in a database; changes nothing."""

    def __init__(self, path: Path, reader: Engine) -> None:
        """Use the connections of an engine that only reads."""
        self.path = path
        self._reader = reader

    @contextmanager
    def looking(self) -> Iterator[Session]:
        """Give a transaction that only reads."""
        with explained(self.path), Session(self._reader, expire_on_commit=False) as session, session.begin():
            yield session

    def listed(self, statement: "Select[Value]") -> list[Value]:
        """List what a query for one column, or for whole rows, finds."""
        with self.looking() as session:
            return list(session.scalars(statement))

    def first(self, statement: "Select[Value]") -> Value | None:
        """Give the first that such a query finds; None if it finds nothing."""
        with self.looking() as session:
            return session.scalars(statement).first()

    def mapped(self, statement: "Select[str, Value]") -> dict[str, Value]:
        """Give what a query for two columns finds, the second by the first."""
        with self.looking() as session:
            return {row[0]: row[1] for row in session.execute(statement)}

    def get(self, job_id: str) -> Job:
        """Give a job by its id.

        Raises:
            KeyError: there is none.
        """
        if (job := self.first(select(Job).where(Job.id == job_id))) is None:
            raise KeyError(job_id)
        return job

    def find(self, wanted: str) -> Job | None:
        """Find the latest job that ``matching`` lists; None if there is none."""
        return next(iter(self.matching(wanted)), None)

    def matching(self, wanted: str) -> list[Job]:
        """List jobs by id, else by name, start of the id, path, or as variations; the latest first."""
        folder, _, name = wanted.rpartition("/")
        conditions = (
            Job.id == wanted,
            Job.name == wanted,
            starts_with(Job.id, wanted) & (wanted != ""),
            (Job.folder == folder) & (Job.name == name),
            (Job.folder == folder) & variation_of(name),
        )
        for condition in conditions:
            if jobs := self.listed(select(Job).where(condition).order_by(Job.seq.desc())):
                return jobs
        return []

    def find_done(self, fingerprint: str) -> Job | None:
        """Give the latest done job with the same pictures, prompt and settings."""
        same = select(Job).where(Job.fingerprint == fingerprint, Job.state == State.DONE)
        return self.first(same.order_by(Job.seq.desc()))

    def taken_as(self, names: Collection[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """Give the id of the latest job, or variation, that was taken in under each folder and name.

        There may be thousands of names: each costs two look-ups in an index.
        """
        asked = {"names": json.dumps(list(names)), "after": LAST}
        with self.looking() as session:
            found = session.execute(TAKEN_AS, asked)
            return {(row[0], row[1]): row[2] for row in found}

    def made_of(self, sha256: str) -> list[Job]:
        """List the jobs with an input of this content."""
        return self.listed(select(Job).where(cast(Job.inputs, String).contains(sha256)))

    def next_queued(
        self, passed_over: Collection[str] = (), place: int = 0, models: Collection[str] | None = None
    ) -> Job | None:
        """Give the first runnable job that is not passed over, or the one ``place`` behind it.

        ``models``: only a job that asks for one of these.
        """
        found = following(Job).where(Job.id.not_in(passed_over)).offset(place)
        if models is not None:
            found = found.where(func.json_extract(Job.settings, "$.model").in_(models))
        return self.first(found)

    def queued_ids(self, passed_over: Collection[str], limit: int) -> list[str]:
        """Give the ids of the first runnable jobs that are not passed over, in the order of the queue."""
        runnable = select(Job.id).where(*RUNNABLE, Job.id.not_in(passed_over))
        return self.listed(runnable.order_by(*IN_ORDER).limit(limit))

    def queued_inputs(self) -> list[tuple[str, dict[str, Input]]]:
        """List the runnable jobs in the order of the queue: id, and inputs by role."""
        found = self.mapped(select(Job.id, Job.inputs).where(*RUNNABLE).order_by(*IN_ORDER))
        return list(found.items())

    def in_state(self, *states: State) -> list[Job]:
        """List jobs by state, in the order of the queue."""
        return self.listed(select(Job).where(Job.state.in_(states)).order_by(Job.position))

    def last_ended(self, limit: int) -> list[Job]:
        """List the jobs that ended last, the latest first."""
        ended = select(Job).where(Job.finished_at.is_not(None))
        return self.listed(ended.order_by(Job.finished_at.desc(), Job.seq.desc()).limit(limit))

    def open_failures(self, limit: int | None = None) -> list[Job]:
        """List the failed jobs that nobody has retried, dropped again or dismissed, the latest first."""
        later = aliased(Job)
        again = select(later.seq).where(
            later.name == Job.name, later.folder == Job.folder, later.seq > Job.seq
        )
        failed = select(Job).where(Job.open_since.is_not(None), ~again.exists())
        return self.listed(failed.order_by(Job.open_since.desc(), Job.seq.desc()).limit(limit))

    def all_jobs(
        self, states: Collection[str] = (), folder: str | None = None, since: datetime | None = None
    ) -> Iterator[Job]:
        """Yield all jobs, the latest first; or those in some states, in a folder, taken or ended since."""
        wanted = select(Job).order_by(Job.seq.desc())
        if states:
            wanted = wanted.where(Job.state.in_(states))
        if folder is not None:
            wanted = wanted.where(
                (Job.folder == folder.strip("/")) | starts_with(Job.folder, f"{folder.strip('/')}/")
            )
        if since is not None:
            wanted = wanted.where(
                func.coalesce(Job.finished_at, Job.created_at)
                >= f"{since.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
            )
        with self.looking() as session:
            yield from session.scalars(wanted).yield_per(500)

    def to_deliver(self, states: Collection[State] = tuple(State)) -> list[str]:
        """Give the ids of jobs whose decided end is one of these states, in the queue's order."""
        decided = Job.delivery.is_not(None) & func.json_extract(Job.delivery, "$.state").in_(states)
        return self.listed(select(Job.id).where(decided).order_by(Job.position))

    def counts(self) -> dict[str, int]:
        """Count the jobs in each state."""
        found = self.mapped(select(Job.state, func.count()).group_by(Job.state))
        return {state.value: found.get(state.value, 0) for state in State}

    def states(self) -> dict[str, str]:
        """Give the state of every job, by id."""
        return self.mapped(select(Job.id, Job.state))

    def levels(self) -> dict[str, int]:
        """Give the memory levels that worked, by device, model and size."""
        return self.mapped(select(MemoryLevel.key, MemoryLevel.level))

    def uncompiled(self) -> dict[str, str]:
        """Give why blocks could not be compiled, by the conditions of the attempt."""
        statement = select(Meta.key, Meta.value).where(Meta.key.startswith(UNCOMPILED, autoescape=True))
        return {key.removeprefix(UNCOMPILED): reason for key, reason in self.mapped(statement).items()}
