"""Describes one job as JSON, for show, hooks and the page."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

from framepackd.jobs.folder import PREVIEW
from framepackd.jobs.job import Job, State
from framepackd.moving import Progress
from framepackd.settings.config import Config


def whole(job: Job, config: Config, delivery: dict[str, Any] | None = None) -> dict[str, Any]:
    """Give one job whole, as ``show --json`` prints it; while it lasts, with what exists to look at.

    ``preview`` is the video so far, ``preview_picture`` the section being sampled; ``delivery`` says how its
    files stand once its end is decided.
    """
    video = config.jobs_dir / job.id / PREVIEW
    previews = {"preview": video, "preview_picture": video.with_suffix(".png")}
    there = {key: str(path) if path.exists() else None for key, path in previews.items()}
    return job.record() | there | {"delivery": delivery or described(job)}


def described(
    job: Job, reason: str | None = None, again: float | None = None, moved: Progress | None = None
) -> dict[str, Any] | None:
    """Say of a job whose end is decided what it is to be, why its files are not there yet, and the next try.

    ``again`` is on the monotonic clock, ``moved`` how much of it was copied so far. None for a job whose end
    is not decided.
    """
    if job.delivery is None:
        return None
    next_try = None
    if again is not None:
        left = timedelta(seconds=max(again - time.monotonic(), 0.0))
        next_try = f"{datetime.now(UTC) + left:%Y-%m-%dT%H:%M:%SZ}"
    return {
        "state": job.delivery["state"],
        "reason": reason,
        "next_try": next_try,
        "bytes_moved": moved.done if moved else None,
        "bytes": moved.total if moved else None,
    }


def running_in(report: dict[str, Any]) -> dict[str, Any] | None:
    """Give the job that is being made; not one whose files are only still to be moved."""
    return next(
        (job for job in report["jobs"] if job["state"] == State.RUNNING and not job["delivery"]), None
    )
