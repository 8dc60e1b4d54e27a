"""Reckons how far a job is, and how long it still takes: its steps and decodes, by the clock."""

from datetime import datetime

from framepackd.jobs.job import Job, State

OVERRUN = 0.1  # what took longer than expected is expected to take so much of its time more


def is_measured(job: Job) -> bool:
    """Say whether a step and a decode of the job were measured."""
    return job.step_seconds is not None and job.decode_seconds is not None and bool(job.work_units)


def is_decoding(job: Job) -> bool:
    """Say whether the section at hand is sampled, and is being decoded."""
    return bool(job.section) and job.step == job.steps


def progress(job: Job, now: datetime) -> float | None:
    """Give how much of the running job is done, 0 to 1; None for any other job.

    All sections count alike. Until a decode was measured, it counts as much as the steps of its section.
    """
    if job.state != State.RUNNING or job.delivery is not None:
        return None
    if not job.section:
        return 0.0
    step = job.step_seconds or 1.0
    decode = job.steps * step
    done = job.step * step
    if job.decode_seconds is not None:
        decode = job.decode_seconds
        done += min(_seconds_since_report(job, now), decode) if is_decoding(job) else 0.0
    share = done / (job.steps * step + decode)
    beyond = job.steps_beyond / job.steps  # sections
    return round(min((job.section - 1 + share + beyond) / job.sections, 1.0), 4)


def remaining(job: Job, like: Job | None, now: datetime) -> float | None:
    """Estimate the seconds that a job still takes, by its own pace or that of ``like``, a job like it.

    None: neither was measured. A job whose steps are known and whose decodes are not has no end: with a small
    model, the decodes are nearly all of it.
    """
    pace = job if is_measured(job) else like
    if job.delivery is not None or pace is None or not job.sections:
        return None
    assert pace.step_seconds is not None
    assert pace.decode_seconds is not None
    scale = job.work_units / pace.work_units
    step = pace.step_seconds * scale if job.step_seconds is None else job.step_seconds
    decode = pace.decode_seconds * scale
    sections_done = max(job.section - 1, 0)
    steps_left = job.steps_total - sections_done * job.steps - job.step - job.steps_beyond
    decodes_left = job.sections - sections_done - job.steps_beyond // job.steps
    left = steps_left * step + max(decodes_left, 0) * decode
    at_hand = decode if is_decoding(job) else step
    gone = _seconds_since_report(job, now)
    return left - gone if gone < at_hand else left - at_hand + min(gone * OVERRUN, at_hand)


def _seconds_since_report(job: Job, now: datetime) -> float:
    if job.state != State.RUNNING or job.progress_at is None:
        return 0.0
    return max((now - datetime.fromisoformat(job.progress_at)).total_seconds(), 0.0)
