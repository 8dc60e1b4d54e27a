"""Jobs in SQLite. Each change of a job's state is one statement in one transaction.

The daemon alone writes. Power loss safe: WAL with ``synchronous=FULL`` fsyncs every commit, which costs
under a millisecond at a commit every few seconds.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Engine, create_engine, event, func, select, text, update
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

from framepackd.names import printable

APPLICATION_ID = 0x4650444D  # "FPDM": tells our files from other SQLite files
SCHEMA_VERSION = 1
STALLED_DEATHS = 5  # daemons that died in a row under a job that finished no step


class StoreError(Exception):
    """The database cannot be used; the text says why and what to do."""


class State(StrEnum):
    """Where a job stands; files that wait for a partner are not jobs yet."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"


ENDED = (State.DONE, State.FAILED, State.CANCELLED, State.SKIPPED)


class _Base(DeclarativeBase):
    type_annotation_map = {  # noqa: RUF012 - as SQLAlchemy declares it
        dict[str, Any]: JSON(none_as_null=True),
        list[dict[str, Any]]: JSON(),
    }


class Job(_Base):
    """One picture and its text on their way to a video."""

    __tablename__ = "job"
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012 - as SQLAlchemy declares it

    seq: Mapped[int] = mapped_column(primary_key=True)  # order of arrival
    position: Mapped[int] = mapped_column(index=True)  # order in the queue
    id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]  # NAME of the dropped files
    folder: Mapped[str] = mapped_column(default="")  # below the inbox; "" at its top
    state: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[str]
    started_at: Mapped[str | None]
    finished_at: Mapped[str | None]
    progress_at: Mapped[str | None]
    history: Mapped[list[dict[str, Any]]] = mapped_column(default=list)  # at, state, note
    inputs: Mapped[dict[str, Any]] = mapped_column(default=dict)  # role -> {file, sha256}
    settings: Mapped[dict[str, Any]] = mapped_column(default=dict)  # resolved, prompt included
    fingerprint: Mapped[str] = mapped_column(default="", index=True)  # of pictures, prompt and settings
    width: Mapped[int] = mapped_column(default=0)
    height: Mapped[int] = mapped_column(default=0)
    frames: Mapped[int] = mapped_column(default=0)
    sections: Mapped[int] = mapped_column(default=0)
    steps_total: Mapped[int] = mapped_column(default=0)
    section: Mapped[int] = mapped_column(default=0)  # the one being made, from 1; 0 before the first
    step: Mapped[int] = mapped_column(default=0)  # steps done in it
    steps_run: Mapped[int] = mapped_column(default=0)  # over all attempts
    step_seconds: Mapped[float | None]  # of one step, smoothed
    decode_seconds: Mapped[float | None]  # of one section, smoothed
    attempts: Mapped[int] = mapped_column(default=0)  # worker deaths and errors
    resumes: Mapped[int] = mapped_column(default=0)  # times it was started again
    stalled_deaths: Mapped[int] = mapped_column(default=0)
    timings: Mapped[dict[str, Any]] = mapped_column(default=dict)  # phase -> seconds
    versions: Mapped[dict[str, Any]] = mapped_column(default=dict)
    model_sources: Mapped[dict[str, Any]] = mapped_column(default=dict)  # repository or folder, with revision
    device: Mapped[str | None]
    delivery: Mapped[dict[str, Any] | None]  # decided, not yet finished: state, error
    error: Mapped[str | None]
    output: Mapped[str | None]
    quality: Mapped[str | None]

    @property
    def path(self) -> str:
        """Name with its folder, as people know it; on one line, whatever the name holds."""
        return printable(f"{self.folder}/{self.name}" if self.folder else self.name)

    @property
    def steps(self) -> int:
        """Steps of a section."""
        return self.steps_total // self.sections if self.sections else 0

    @property
    def work_units(self) -> float:
        """A measure of what one step costs: tokens, twice where guidance calls the model twice."""
        calls = 2 if self.settings.get("true_cfg_scale", 1) != 1 else 1
        return self.width * self.height * float(self.settings.get("latent_window_size", 9)) * calls

    def record(self) -> dict[str, Any]:
        """Give the job whole, as ``NAME.json`` and ``show --json`` have it."""
        columns = {column.name: getattr(self, column.name) for column in self.__table__.columns}
        for internal in (
            "seq",
            "position",
            "delivery",
            "fingerprint",
            "stalled_deaths",
            "settings",
            "progress_at",
        ):
            del columns[internal]
        return {**columns, **self.settings, "fps": 30}


def utc_now() -> str:
    """Give the time as it is recorded: UTC, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class JobStore:
    """The queue. Threads may share it: each call has a connection and a transaction of its own."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the database, and create it if it is not there.

        Raises:
            StoreError: it is damaged, somebody else's, of a newer version, or cannot be opened.
        """
        self.path = path
        if read_only or path.exists():
            self._verify()  # before a connection that could change anything
        self._engine = _connect_to(path, read_only=read_only)
        with self._explained(), self._engine.begin() as connection:
            if not read_only:
                _Base.metadata.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _verify(self) -> None:
        with self._explained(), _connect_to(self.path, read_only=True).begin() as connection:
            tables, application, version = (
                connection.exec_driver_sql(query).scalar_one()
                for query in (
                    "SELECT count(*) FROM sqlite_master",
                    "PRAGMA application_id",
                    "PRAGMA user_version",
                )
            )
        if tables and application != APPLICATION_ID:
            raise StoreError(
                f"{self.path} is not framepackd's database: move it away, or set another state_dir"
            )
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} was written by a newer framepackd (schema {version}, this one knows "
                f"{SCHEMA_VERSION}): install the newer version again"
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into ones that say what to do."""
        try:
            yield
        except DatabaseError as error:
            raise StoreError(
                f"{self.path} cannot be used ({error.orig}): check that it is a SQLite file on a local disk, "
                "readable and writable for this user; nothing in it was changed"
            ) from error

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with self._explained(), Session(self._engine, expire_on_commit=False) as session, session.begin():
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
                section=0,
                step=0,
                history=_with_entry(State.RUNNING, "started"),
            )
            .returning(Job)
        )
        with self._session() as session:
            return session.scalars(statement).one_or_none()

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
        self._move(job_id, State.QUEUED, note, section=0, step=0)

    def count_attempt(self, job_id: str, note: str) -> int:
        """Put a running job back after its worker died or failed on it; says how often that was."""
        self._move(job_id, State.QUEUED, note, section=0, step=0, attempts=Job.attempts + 1)
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
            self._move(job.id, State.QUEUED, note, section=0, step=0, stalled_deaths=deaths, **back)
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


def _quote(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _connect_to(path: Path, *, read_only: bool) -> Engine:
    """Set every connection up, and begin transactions ourselves.

    Left to itself, sqlite3 begins late: two threads could claim one job, and DDL is not rolled back.
    """
    location = f"sqlite:///file:{_quote(path)}?uri=true" + ("&mode=ro" if read_only else "")
    engine = create_engine(location, poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA busy_timeout=5000")
        if not read_only:
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.execute(text("BEGIN" if read_only else "BEGIN IMMEDIATE"))

    return engine
