"""A job: its row in the database, and the states that it goes through."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, Index, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from framepackd.jobs import job_warnings
from framepackd.settings import players
from framepackd.text import printable


class State(StrEnum):
    """Where a job stands; files that wait for a partner are not jobs yet."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"

    @property
    def folder(self) -> str:
        """The key of the folder that such a job's files go to; one that is to run again comes from there."""
        return "outbox" if self in (State.DONE, State.SKIPPED) else "failed"


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
    # What each round asks must not cost more where a hundred thousand jobs have ended.
    __table_args__ = (
        Index("ix_job_queue", "state", "position"),
        Index("ix_job_name", "name", "folder"),
        Index("ix_job_undelivered", "position", sqlite_where=text("delivery IS NOT NULL")),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(primary_key=True)  # order of arrival
    position: Mapped[int] = mapped_column(index=True)  # order in the queue
    id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]  # NAME of the dropped files
    folder: Mapped[str] = mapped_column(default="")  # below the inbox; "" at its top
    state: Mapped[str]
    created_at: Mapped[str]
    started_at: Mapped[str | None]
    finished_at: Mapped[str | None] = mapped_column(index=True)
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
    # How it was computed, where there is a choice: precision ...
    computation: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")
    # Prompts that are too long for a text encoder: see job_warnings.
    cuts: Mapped[list[dict[str, Any]]] = mapped_column(default=list, server_default="[]")
    device: Mapped[str | None]
    delivery: Mapped[dict[str, Any] | None]  # decided, not yet finished: state, error
    error: Mapped[str | None]
    output: Mapped[str | None]
    quality: Mapped[str | None]
    cancel: Mapped[str | None]  # wished: "discard" or "keep" what exists; such a job never runs again
    stem: Mapped[str | None]  # NAME under which its files were delivered

    @property
    def path(self) -> str:
        """Name with its folder, as people know it; on one line, whatever the name holds."""
        return printable(f"{self.folder}/{self.name}" if self.folder else self.name)

    @property
    def steps(self) -> int:
        """Steps of a section."""
        return self.steps_total // self.sections if self.sections else 0

    @property
    def clips(self) -> int:
        """How many clips the video is joined of: of a chain one for each pair of frames."""
        roles = self.inputs or {}  # none before it is recorded
        if "video" in roles:  # which is gone on with, whatever it was made from
            return 1
        return max(sum(role.startswith("frame-") for role in roles) - 1, 1)

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
            "cancel",
            "stem",
        ):
            del columns[internal]
        apart = {"clips": self.clips, "fps": 30, "frame_diff": self.frame_diff, "warnings": self.warnings}
        return {**columns, **self.settings, **apart}

    @property
    def warnings(self) -> list[str]:
        """What a person should know of the job, and what keeps it from nothing."""
        settings = self.settings or {}
        return [
            *job_warnings.of_cuts(self.cuts or []),
            *job_warnings.of_loras(settings),
            *players.of_crf(settings),
        ]

    @property
    def frame_diff(self) -> float | list[float] | None:
        """How much its pictures differ, if that was dropped with them; for a chain one for each pair."""
        values: list[float] = self.inputs.get("diff", {}).get("values", [])
        return values[0] if len(values) == 1 else values or None


class Meta(Base):
    """What holds for the whole queue, by name."""

    __tablename__ = "meta"

    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class MemoryRung(Base):
    """Which rung of the memory ladder worked, by device, model and size."""

    __tablename__ = "memory_rung"

    key: Mapped[str] = mapped_column(primary_key=True)
    rung: Mapped[int]


def utc_now() -> str:
    """Give the time as it is recorded."""
    return as_recorded(datetime.now(UTC))


def as_recorded(when: datetime) -> str:
    """Give a time of UTC as it is recorded: in ISO 8601, to the second."""
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")
