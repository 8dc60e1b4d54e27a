"""Takes the snapshot of queue, waiting files and daemon that ``status --json`` prints.

Made by the daemon when it is asked, and by the command itself from the database when none runs.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from framepackd.inbox.scan import Waiting
from framepackd.jobs.described import described, running_in
from framepackd.jobs.job import ENDED, Job, State
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.text import as_utf8, percent, printable, size_text

LAST_RESULTS = 100


def snapshot(
    store: JobStore | None,
    waiting: tuple[Waiting, ...],
    daemon: dict[str, Any],
    problems: Iterable[Problem] = (),
    *,
    delivery: Callable[[Job], dict[str, Any] | None] = lambda job: described(job),
    passed_over: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Gather it; ``store`` is None where there is no database yet.

    ``delivery`` says how the files of a job stand, ``passed_over`` why some jobs, by id, cannot run just now.
    """
    passed_over = passed_over or {}
    active = store.in_state(State.RUNNING, State.QUEUED) if store else []
    active.sort(key=lambda job: (job.state != State.RUNNING, job.position))
    ended = store.last_ended(LAST_RESULTS) if store else []
    counts = store.counts() if store else {state.value: 0 for state in State}
    remaining = _estimate(active, ended)
    to_come = [
        seconds
        for job, seconds in zip(active, remaining, strict=True)
        if job.delivery is None and job.id not in passed_over
    ]
    known = [seconds for seconds in to_come if seconds is not None]
    foreseeable = to_come and len(known) == len(to_come) and daemon["paused"] is None
    return {
        "daemon": daemon,
        "counts": {"waiting": len(waiting), **counts},
        "eta_seconds": round(sum(known), 1) if foreseeable else None,
        "jobs": [
            *(
                _summary(job, None if job.id in passed_over else eta, delivery(job), passed_over.get(job.id))
                for job, eta in zip(active, remaining, strict=True)
            ),
            *(_summary(job, None, None) for job in ended),
        ],
        "waiting": [entry.as_json() for entry in waiting],
        "problems": [{"code": problem.code, "text": as_utf8(problem.text)} for problem in problems],
    }


def _summary(
    job: Job, eta: float | None, delivery: dict[str, Any] | None, note: str | None = None
) -> dict[str, Any]:
    return {
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
        "progress": _progress(job),
        "stage": _stage(job),
        "eta_seconds": None if eta is None else round(eta, 1),
        "error": job.error or (job.delivery["error"] if job.delivery else None),
        "output": job.output,
        "quality": job.quality,
        "warnings": job.warnings,
        "note": note or _note(job, delivery),
        "delivery": delivery,
        "finished_at": job.finished_at,
    }


def _progress(job: Job) -> float | None:
    """Give how much of the steps of the job that is made is done, 0 to 1; None for any other job."""
    if job.state != State.RUNNING or job.delivery is not None:
        return None
    done = max(job.section - 1, 0) * job.steps + job.step
    return round(done / max(job.sections * job.steps, 1), 4)


def _stage(job: Job) -> list[str]:
    """Say in words where the job that is made is: which clip of a chain, which section of it, which step."""
    if job.state != State.RUNNING or job.delivery is not None:
        return []
    if not job.section:
        return ["loading the model"]
    sections = job.sections // job.clips
    before, section = divmod(job.section - 1, sections)
    return [
        *([f"clip {before + 1}/{job.clips}"] if job.clips > 1 else []),
        f"section {section + 1}/{sections}",
        "decoding" if job.step == job.steps else f"step {job.step}/{job.steps}",
    ]


def in_one_line(report: dict[str, Any], now: datetime) -> str:
    """Say what runs, when it ends and how much waits, as ``systemctl status`` shows it."""
    counts = report["counts"]
    running = running_in(report)
    if running is None:
        paused = report["daemon"]["paused"]
        words = [f"paused: {printable(str(paused))}" if paused else "idle"]
    else:
        words = [_where(running), _clock(running["eta_seconds"], now)]
    queue = [f"{counts[state]} {state}" for state in ("queued", "waiting", "failed") if counts[state]]
    if counts["queued"]:
        queue.insert(1, _clock(report["eta_seconds"], now, "all done"))
    if problems := len(report["problems"]):
        queue.append(f"{problems} problem{'' if problems == 1 else 's'}")
    return "; ".join(", ".join(filter(None, part)) for part in (words, queue) if any(part))


def _where(job: dict[str, Any]) -> str:
    path = printable("/".join(filter(None, (job["folder"], job["name"]))))
    share = f"{percent(job['progress'])} %, " if job["section"] else ""
    return f"{path}: {share}{', '.join(job['stage'])}"


def _clock(seconds: float | None, now: datetime, what: str = "done") -> str:
    """Give the time at which something ends: unlike a span it stays true while nobody asks again."""
    if seconds is None:
        return ""
    end = (now + timedelta(seconds=seconds)).astimezone()
    day = "" if end.date() == now.astimezone().date() else f"{end:%a} "
    return f"{what} {day}{end:%H:%M}"


def _note(job: Job, delivery: dict[str, Any] | None) -> str | None:
    """Point out what a person should know of a job that is not done."""
    if delivery is not None:
        if delivery["reason"]:
            return f"its files cannot be moved: {delivery['reason']}"
        moved = f": {size_text(delivery['bytes_moved'])} of {size_text(delivery['bytes'])}"
        return f"its files are being moved{moved if delivery['bytes'] else ''}"
    if job.cancel is not None and job.state not in ENDED:
        return "is being cancelled"
    if job.state == State.QUEUED and job.stalled_deaths >= 1 and job.resumes >= 1:
        return f"the daemon ended {job.stalled_deaths} times under it before a step was done"
    return None


def _estimate(active: list[Job], ended: list[Job]) -> list[float | None]:
    """Estimate the seconds each active job still takes, by its own pace or that of the last one like it."""
    paces: dict[object, Job] = {}  # the first of each model
    for job in filter(_is_paced, (*active, *ended)):
        paces.setdefault(job.settings.get("model"), job)
    return [
        _remaining(job, job if _is_paced(job) else paces.get(job.settings.get("model"))) for job in active
    ]


def _is_paced(job: Job) -> bool:
    return job.step_seconds is not None and bool(job.work_units)


def _remaining(job: Job, pace: Job | None) -> float | None:
    if job.delivery is not None or pace is None or pace.step_seconds is None or not job.sections:
        return None
    scale = job.work_units / pace.work_units
    sections_done = max(job.section - 1, 0)  # decoded; the one at hand still has to be
    steps_done = max(job.section - 1, 0) * job.steps + job.step
    steps = (job.steps_total - steps_done) * pace.step_seconds * scale
    decodes = (job.sections - sections_done) * (pace.decode_seconds or 0.0) * scale
    return max(steps + decodes - _since(job.progress_at, job), 0.0)


def _since(progress_at: str | None, job: Job) -> float:
    """Give the seconds since the last sign of life of a running job, at most those of what it is doing."""
    if job.state != State.RUNNING or progress_at is None or job.step_seconds is None:
        return 0.0
    at_hand = (job.decode_seconds or 0.0) if job.step == job.steps else job.step_seconds
    then = datetime.fromisoformat(progress_at)
    return min((datetime.now(UTC) - then).total_seconds(), at_hand)
