"""Reckons what a new video will take on this card, from the videos that were made before it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from framepackd.jobs.report import JobReport, Report
from framepackd.web import tonight


@dataclass(frozen=True)
class Cost:
    """What is known of it before it is asked for."""

    seconds: float | None  # of work, for all of them; None: nothing like it was made yet
    ends_at: str | None  # behind the queue; None while that cannot be known
    before: int  # jobs that come before it
    paused: bool


@dataclass(frozen=True)
class Plan:
    """What is to be made."""

    model: str
    sections: int
    steps: int
    pixels: float | None  # of a frame; None: as of the last video
    count: int = 1


def reckon(report: Report, plan: Plan, now: datetime | None = None) -> Cost:
    """Say what a plan costs, and when it ends behind the queue."""
    now = now or datetime.now(UTC)
    each = _seconds(report["jobs"], plan)
    before = tonight.jobs_to_go(report)
    takes = [job["eta_seconds"] for job in before]
    paused = report["daemon"]["paused"] is not None
    whole = None if each is None else each * plan.count
    known = [seconds for seconds in takes if seconds is not None]
    certain = whole is not None and len(known) == len(takes) and not paused
    ends = now + timedelta(seconds=sum(known) + whole) if certain and whole is not None else None
    return Cost(whole, f"{ends:%Y-%m-%dT%H:%M:%SZ}" if ends else None, len(before), paused)


def _seconds(jobs: list[JobReport], plan: Plan) -> float | None:
    """Take the pace of the last video of the model: seconds for each step and pixel, and for each decode."""
    for job in jobs:
        pace = _pace(job, plan.model)
        if pace is None:
            continue
        step, decode, pixels = pace
        scale = plan.pixels / pixels if plan.pixels else 1.0
        return plan.sections * (plan.steps * step + decode) * scale
    return None


def _pace(job: JobReport, model: str) -> tuple[float, float, float] | None:
    pixels = (job["width"] or 0) * (job["height"] or 0)
    step, decode = job["step_seconds"], job["decode_seconds"]
    if job["model"] != model or not step or decode is None or not pixels:
        return None
    return float(step), float(decode), float(pixels)
