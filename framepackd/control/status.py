"""Takes the snapshot of queue, waiting files and daemon that ``status --json`` prints.

Made by the daemon when it is asked, and by the command itself from the database when none runs.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from framepackd.control.facts import facts_of
from framepackd.control.schedule import PASSED_OVER, UNKNOWN, lay_out, span
from framepackd.inbox.scan import Waiting
from framepackd.jobs.described import described, note, stage
from framepackd.jobs.job import Job, State, as_recorded
from framepackd.jobs.pace import is_measured, progress, remaining
from framepackd.jobs.reader import JobReader
from framepackd.jobs.report import (
    DaemonReport,
    DeliveryReport,
    FactsReport,
    JobReport,
    Report,
    at_work,
    running_in,
)
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.text import as_utf8, clock, path_of, percent, printable

LAST_RESULTS = 100
OPEN_FAILURES = 100


def snapshot(
    store: JobStore | None,
    waiting: tuple[Waiting, ...],
    daemon: DaemonReport,
    problems: Iterable[Problem] = (),
    *,
    delivery: Callable[[Job], DeliveryReport | None] = described,
    passed_over: Mapping[str, str] = MappingProxyType({}),
    kinds: Mapping[str, str] = MappingProxyType({}),
) -> Report:
    """Take the snapshot; ``store`` is None where there is no database yet.

    ``delivery`` says how the files of a job stand, ``passed_over`` why some jobs, by id, cannot run just now,
    ``kinds`` of what kind each model is.
    """
    now = datetime.now(UTC)
    active = store.in_state(State.RUNNING, State.QUEUED) if store else []
    active.sort(key=lambda job: (job.state != State.RUNNING, job.position))
    ended, failures = _ended(store) if store else ([], frozenset())
    counts = store.counts() if store else {state.value: 0 for state in State}
    writes, computing = _by_job(daemon)
    left = _estimate(active, ended, now, computing)
    to_come = [
        seconds
        for job, seconds in zip(active, left, strict=True)
        if job.delivery is None and job.id not in passed_over
    ]
    known = [seconds for seconds in to_come if seconds is not None]
    foreseeable = to_come and len(known) == len(to_come) and daemon["paused"] is None
    devices = at_work(daemon)
    eta = span(known, devices) if foreseeable else None
    takes = [
        PASSED_OVER if job.delivery is not None or job.id in passed_over else seconds
        for job, seconds in zip(active, left, strict=True)
    ]
    places = lay_out(takes, now, paused=daemon["paused"] is not None, devices=devices)
    places += [UNKNOWN] * len(ended)
    jobs = [
        summary(
            job,
            facts=facts_of(job, kinds, place, ", ".join(computing.get(job.id, ())) or writes.get(job.id)),
            delivery=delivery(job),
            passed_over=passed_over.get(job.id),
            eta=None if job.id in passed_over else seconds,
            now=now,
            is_open=job.id in failures,
            finishing=job.id in writes,
            at_once=len(computing.get(job.id, ())),
        )
        for job, seconds, place in zip([*active, *ended], [*left, *[None] * len(ended)], places, strict=True)
    ]
    return {
        "daemon": daemon,
        "counts": {"waiting": len(waiting), **counts},
        "eta_seconds": None if eta is None else round(eta, 1),
        "finishes_at": _after(eta, now),
        "jobs": jobs,
        "waiting": [entry.as_json() for entry in waiting],
        "problems": [{"code": problem.code, "text": as_utf8(problem.text)} for problem in problems],
    }


def _by_job(daemon: DaemonReport) -> tuple[dict[str | None, str], dict[str | None, list[str]]]:
    """Give, by job, the device that writes its video, and the devices that compute it, its own first."""
    devices = daemon.get("devices", ())
    computing: dict[str | None, list[str]] = {device["job"]: [device["name"]] for device in devices}
    for device in devices:
        computing.setdefault(device.get("helps"), []).append(device["name"])
    return {device.get("finishing"): device["name"] for device in devices}, computing


def summary(
    job: Job,
    *,
    facts: FactsReport,
    delivery: DeliveryReport | None = None,
    passed_over: str | None = None,
    eta: float | None = None,
    now: datetime,
    is_open: bool = False,
    finishing: bool = False,
    at_once: int = 1,
) -> JobReport:
    """Describe one job in short, as ``status`` and ``list`` have it."""
    return {
        **facts,
        "id": job.id,
        "name": job.name,
        "folder": job.folder,
        "state": job.state,
        "attempts": job.attempts,
        "resumes": job.resumes,
        "section": job.section,
        "sections": job.sections,
        "clips": job.clips,
        "step": job.step,
        "steps": job.steps,
        "frames": job.frames,
        "progress": progress(job, now),
        "stage": ["finishing"] if finishing else stage(job, at_once),
        "eta_seconds": None if eta is None else round(eta, 1),
        "finishes_at": _after(eta, now),
        "error": job.error or (job.delivery["error"] if job.delivery else None),
        "output": job.output,
        "quality": job.quality,
        "warnings": job.warnings,
        "note": note(job, delivery, passed_over),
        "delivery": delivery,
        "finished_at": job.finished_at,
        "open": is_open,
    }


def _ended(store: JobReader) -> tuple[list[Job], frozenset[str]]:
    """Give the last results, the latest first, and among them every open failure, whose ids come second."""
    last, failures = store.last_ended(LAST_RESULTS), store.open_failures(OPEN_FAILURES)
    jobs = {job.id: job for job in (*last, *failures)}
    in_order = sorted(jobs.values(), key=lambda job: (job.finished_at or "", job.seq), reverse=True)
    return in_order, frozenset(job.id for job in failures)


def _after(seconds: float | None, now: datetime) -> str | None:
    return None if seconds is None else as_recorded(now + timedelta(seconds=seconds))


def in_one_line(report: Report, now: datetime) -> str:
    """Say what runs, when it ends and how much waits, as ``systemctl status`` shows it."""
    counts = report["counts"]
    now_made = [_made_now(job, now) for job in running_in(report)]
    paused = report["daemon"]["paused"]
    idle = [f"paused: {printable(paused)}" if paused else "idle"]
    queue = [f"{counts[state]} {state}" for state in ("queued", "waiting", "failed") if counts[state]]
    if counts["queued"]:
        queue.insert(1, _done(report["finishes_at"], now, "all done"))
    if problems := len(report["problems"]):
        queue.append(f"{problems} problem{'' if problems == 1 else 's'}")
    return "; ".join(", ".join(filter(None, part)) for part in (*(now_made or [idle]), queue) if any(part))


def _made_now(job: JobReport, now: datetime) -> list[str]:
    share = f"{percent(job['progress'] or 0.0)} %, " if job["section"] else ""
    path = printable(path_of(job["folder"], job["name"]))
    return [f"{path}: {share}{', '.join(job['stage'])}", _done(job["finishes_at"], now)]


def _done(when: str | None, now: datetime, what: str = "done") -> str:
    """Say when something ends: unlike a span, a time stays true while nobody asks again."""
    return f"{what} {clock(when, now)}" if when else ""


def _estimate(
    active: list[Job], ended: list[Job], now: datetime, computing: Mapping[str | None, list[str]]
) -> list[float | None]:
    """Estimate the seconds that each active job still takes, by its own pace or that of the last like it.

    ``computing``: the devices of a job; several of them make its clips side by side.
    """
    measured: dict[object, Job] = {}  # the first of each model
    for job in filter(is_measured, (*active, *ended)):
        measured.setdefault(job.settings.get("model"), job)
    left = [remaining(job, measured.get(job.settings.get("model")), now) for job in active]
    at_once = [len(computing.get(job.id, ())) or 1 for job in active]
    return [None if seconds is None else seconds / many for seconds, many in zip(left, at_once, strict=True)]
