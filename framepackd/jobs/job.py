"""A job: its row in the database, and the states that it goes through."""

from collections.abc import Collection
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NotRequired, TypedDict

from sqlalchemy import JSON, Index, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from framepackd.jobs import job_warnings
from framepackd.text import printable


class State(StrEnum):
    """The states of a job; files that wait for others in the inbox are not jobs yet."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"

    @property
    def folder(self) -> str:
        """The config key of the folder that the job's files move to, or return from to run again."""
        return "outbox" if self in (State.DONE, State.SKIPPED) else "failed"


ENDED = (State.DONE, State.FAILED, State.CANCELLED, State.SKIPPED)
# Columns that are not part of a job's record; what "settings" holds is, key by key.
INTERNAL = (
    *("seq", "position", "delivery", "fingerprint", "stalled_deaths", "steps_beyond"),
    *("settings", "progress_at", "cancel", "open_since", "stem"),
)


class HistoryEntry(TypedDict):
    """One line of a job's history."""

    at: str
    state: str
    note: str


class Input(TypedDict):
    """A dropped file of a job."""

    file: str  # its name in the work folder
    sha256: str | None  # None if it could not be read
    values: NotRequired[list[float]]  # of NAME_frame_diff.txt
    passed_over: NotRequired[list[str]]  # of a picture, in words


class Decision(TypedDict):
    """How a job is to end, or that it is to run again, decided before any file moves."""

    state: str
    error: str | None


class Base(DeclarativeBase):
    """What the tables share."""


class Job(Base):
    """One picture and its text on their way to a video."""

    __tablename__ = "job"
    # Each round runs these queries: they must stay fast with a hundred thousand ended jobs.
    __table_args__ = (
        Index("ix_job_queue", "state", "position"),
        Index("ix_job_name", "name", "folder"),
        Index("ix_job_undelivered", "position", sqlite_where=text("delivery IS NOT NULL")),
        Index("ix_job_open", "open_since", sqlite_where=text("open_since IS NOT NULL")),
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
    history: Mapped[list[HistoryEntry]] = mapped_column(JSON, default=list)
    inputs: Mapped[dict[str, Input]] = mapped_column(JSON, default=dict)  # by role
    settings: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)  # resolved, prompt included
    fingerprint: Mapped[str] = mapped_column(default="", index=True)  # of pictures, prompt and settings
    width: Mapped[int] = mapped_column(default=0)
    height: Mapped[int] = mapped_column(default=0)
    frames: Mapped[int] = mapped_column(default=0)
    sections: Mapped[int] = mapped_column(default=0)
    steps_total: Mapped[int] = mapped_column(default=0)
    section: Mapped[int] = mapped_column(default=0)  # the current one, from 1; 0 before the first
    step: Mapped[int] = mapped_column(default=0)  # steps done in it
    # Done beyond this place, of a chain's later clips; below 0 while a clip before it is not whole.
    steps_beyond: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    steps_run: Mapped[int] = mapped_column(default=0)  # over all attempts
    step_seconds: Mapped[float | None]  # of one step, smoothed
    decode_seconds: Mapped[float | None]  # of one section, smoothed
    attempts: Mapped[int] = mapped_column(default=0)  # worker deaths and errors
    resumes: Mapped[int] = mapped_column(default=0)  # starts after the first
    stalled_deaths: Mapped[int] = mapped_column(default=0)  # of daemons in a row, without a step between
    timings: Mapped[dict[str, float]] = mapped_column(JSON, default=dict)  # seconds by phase
    versions: Mapped[dict[str, str]] = mapped_column(JSON, default=dict)
    model_sources: Mapped[dict[str, str]] = mapped_column(JSON, default=dict)  # repository@revision or folder
    # How it was computed, where there is a choice: precision ...
    computation: Mapped[dict[str, str | bool]] = mapped_column(JSON, default=dict, server_default="{}")
    cuts: Mapped[list[job_warnings.CutPrompt]] = mapped_column(JSON, default=list, server_default="[]")
    device: Mapped[str | None]
    delivery: Mapped[Decision | None] = mapped_column(JSON(none_as_null=True))  # until it is carried out
    error: Mapped[str | None]
    output: Mapped[str | None]
    quality: Mapped[str | None]
    cancel: Mapped[str | None]  # if asked for: "discard" or "keep" what exists of the video
    open_since: Mapped[str | None]  # of a failure, until a person has retried it or put it away
    stem: Mapped[str | None]  # NAME under which its files were delivered

    @property
    def path(self) -> str:
        """The name with its folder, printable on one line."""
        return printable(f"{self.folder}/{self.name}" if self.folder else self.name)

    @property
    def steps(self) -> int:
        """The steps of a section."""
        return self.steps_total // self.sections if self.sections else 0

    @property
    def clips(self) -> int:
        """How many clips the video is joined of."""
        return clips_of(self.inputs or {})  # None before the row is written

    @property
    def work_units(self) -> float:
        """The relative cost of a step: pixels times latent frames, twice if guidance doubles the calls."""
        calls = 2 if self.settings.get("true_cfg_scale", 1) != 1 else 1
        return self.width * self.height * float(self.settings.get("latent_window_size", 9)) * calls

    def record(self) -> dict[str, Any]:
        """Give the job as ``NAME.json`` and ``show --json`` have it."""
        names = [column.name for column in self.__table__.columns if column.name not in INTERNAL]
        columns = {name: getattr(self, name) for name in names}
        apart = {"clips": self.clips, "fps": 30, "frame_diff": self.frame_diff, "warnings": self.warnings}
        return {**columns, **self.settings, **apart}

    @property
    def warnings(self) -> list[str]:
        """What a person should know of the job, although it runs."""
        settings = self.settings or {}
        return [
            *job_warnings.of_cuts(self.cuts or []),
            *job_warnings.of_loras(settings),
            *job_warnings.of_crf(settings),
        ]

    @property
    def frame_diff(self) -> float | list[float] | None:
        """How much its pictures differ, if NAME_frame_diff.txt said; for a chain one number a pair."""
        values = self.inputs["diff"].get("values", []) if "diff" in self.inputs else []
        return values[0] if len(values) == 1 else values or None


def clips_of(roles: Collection[str]) -> int:
    """Count the clips that inputs of these roles become: of a chain one for each pair of frames."""
    if "video" in roles:  # the job extends it, whatever it was made from
        return 1
    return max(sum(role.startswith("frame-") for role in roles) - 1, 1)


class Meta(Base):
    """Values of the whole queue, by name."""

    __tablename__ = "meta"

    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class MemoryLevel(Base):
    """Which memory level worked, by device, model and size."""

    __tablename__ = "memory_rung"

    key: Mapped[str] = mapped_column(primary_key=True)
    level: Mapped[int] = mapped_column("rung")


def utc_now() -> str:
    """Give the time as it is recorded."""
    return as_recorded(datetime.now(UTC))


def as_recorded(when: datetime) -> str:
    """Give a time of UTC as it is recorded: in ISO 8601, to the second."""
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")
