"""Describes a job for people: progress, stage, note and delivery, once for all who draw them."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from framepackd.files.moving import Progress
from framepackd.jobs.folder import PREVIEW, where
from framepackd.jobs.job import ENDED, Job, State, as_recorded
from framepackd.jobs.pace import is_decoding, progress
from framepackd.jobs.report import DeliveryReport, Record
from framepackd.settings.config import Config
from framepackd.text import size_text


def whole(
    job: Job,
    config: Config,
    delivery: DeliveryReport | None = None,
    passed_over: Mapping[str, str] = MappingProxyType({}),
) -> Record:
    """Give one job whole, as ``show --json`` prints it.

    ``reason_file`` says why a failed or cancelled job ended, and lies beside its other files; ``preview`` is
    the video so far and ``preview_picture`` the section being sampled, while they exist;
    ``delivery`` says how its files stand once its end is decided, ``passed_over`` why jobs, by id, cannot run
    just now.
    """
    video = config.jobs_dir / job.id / PREVIEW
    previews = {"preview": video, "preview_picture": video.with_suffix(".png")}
    there = {key: str(path) if path.exists() else None for key, path in previews.items()}
    delivery = delivery or described(job)
    told = {
        "progress": progress(job, datetime.now(UTC)),
        "stage": stage(job),
        "note": note(job, delivery, passed_over.get(job.id)),
        "delivery": delivery,
        "reason_file": _reason_file(job, config),
    }
    return job.record() | there | told


def _reason_file(job: Job, config: Config) -> str | None:
    """Give the file beside those of a failed or cancelled job that says why it ended."""
    endings = {State.FAILED: "error", State.CANCELLED: "cancelled"}
    if job.state not in endings or job.stem is None:
        return None
    folder, stem = where(job)
    return str(config.failed / folder / f"{stem}.{endings[State(job.state)]}.txt")


def described(
    job: Job, reason: str | None = None, again: float | None = None, moved: Progress | None = None
) -> DeliveryReport | None:
    """Give what a job is to become, why its files are not there yet, and the next try.

    ``again`` is on the monotonic clock, ``moved`` how much of it was copied so far. None for a job whose end
    is not decided.
    """
    if job.delivery is None:
        return None
    next_try = None
    if again is not None:
        left = timedelta(seconds=max(again - time.monotonic(), 0.0))
        next_try = as_recorded(datetime.now(UTC) + left)
    return {
        "state": job.delivery["state"],
        "reason": reason,
        "next_try": next_try,
        "bytes_moved": moved.done if moved else None,
        "bytes": moved.total if moved else None,
    }


def stage(job: Job, at_once: int = 1) -> list[str]:
    """Say where the running job is: which clip of a chain, which section of it, which step; else [].

    ``at_once``: how many clips of it are made at once.
    """
    if job.state != State.RUNNING or job.delivery is not None:
        return []
    if not job.section:
        return ["loading the model"]
    sections = job.sections // job.clips
    before, section = divmod(job.section - 1, sections)
    others = "" if at_once < 2 else " and another" if at_once == 2 else f" and {at_once - 1} others"
    return [
        *([f"clip {before + 1}/{job.clips}{others}"] if job.clips > 1 else []),
        f"section {section + 1}/{sections}",
        "decoding" if is_decoding(job) else f"step {job.step}/{job.steps}",
    ]


def note(job: Job, delivery: DeliveryReport | None, passed_over: str | None = None) -> str | None:
    """Say what a person should know of a job that has not ended; ``passed_over``: why it cannot run now."""
    if passed_over is not None:
        return passed_over
    if delivery is not None:
        if delivery["reason"]:
            return f"its files cannot be moved: {delivery['reason']}"
        moved = f": {size_text(delivery['bytes_moved'])} of {size_text(delivery['bytes'])}"
        return f"its files are being moved{moved if delivery['bytes'] else ''}"
    if job.cancel is not None and job.state not in ENDED:
        return "is being cancelled"
    if job.state != State.QUEUED:
        return None
    if job.stalled_deaths >= 1 and job.resumes >= 1:
        often = "once" if job.stalled_deaths == 1 else f"{job.stalled_deaths} times"
        return f"the daemon ended {often} under it before a step was done"
    return f"attempt {job.attempts + 1}" if job.attempts else None
