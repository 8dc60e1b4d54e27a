"""The database: its table, its schema version, and how every connection to it is set up.

Power loss safe: WAL with ``synchronous=FULL`` fsyncs every commit; there is one every few seconds.
A file that is not ours, damaged or of a newer version is refused and never written.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Engine, create_engine, event, text
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

from framepackd.names import printable

APPLICATION_ID = 0x4650444D  # "FPDM": tells our files from other SQLite files
SCHEMA_VERSION = 1


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


class Base(DeclarativeBase):
    """What the tables share."""

    type_annotation_map = {  # noqa: RUF012 - as SQLAlchemy declares it
        dict[str, Any]: JSON(none_as_null=True),
        list[dict[str, Any]]: JSON(),
    }


class Job(Base):
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


def open_database(path: Path, *, read_only: bool = False) -> Engine:
    """Open the database, and create it if it is not there.

    Raises:
        StoreError: it is damaged, somebody else's, of a newer version, or cannot be opened.
    """
    if read_only or path.exists():
        _verify(path)  # before a connection that could change anything
    engine = _connect_to(path, read_only=read_only)
    with explained(path), engine.begin() as connection:
        if not read_only:
            Base.metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return engine


def _verify(path: Path) -> None:
    with explained(path), _connect_to(path, read_only=True).begin() as connection:
        tables, application, version = (
            connection.exec_driver_sql(query).scalar_one()
            for query in (
                "SELECT count(*) FROM sqlite_master",
                "PRAGMA application_id",
                "PRAGMA user_version",
            )
        )
    if tables and application != APPLICATION_ID:
        raise StoreError(f"{path} is not framepackd's database: move it away, or set another state_dir")
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer framepackd (schema {version}, this one knows "
            f"{SCHEMA_VERSION}): install the newer version again"
        )


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ones that say what to do."""
    try:
        yield
    except DatabaseError as error:
        raise StoreError(
            f"{path} cannot be used ({error.orig}): check that it is a SQLite file on a local disk, "
            "readable and writable for this user; nothing in it was changed"
        ) from error


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
