"""Turns the snapshot into what the page shows: the night line, the stage, the queue and what needs a word."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from framepackd import text
from framepackd.jobs.report import JobReport, Report, WaitingReport, at_work
from framepackd.web.rendering import clock, span

Job = JobReport
PIECES = 40  # of the night line; what is behind them is one more
CARDS = 60  # of the queue at once
STEPS_MINUTES = (1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1440)  # between two marks of the hours
MARKS = 7
BY_HAND = "by framepackd pause"  # how a pause that people asked for begins
STATES = {"stopped": "no daemon", "died": "no daemon", "unknown": "cannot tell", "stopping": "stopping"}


@dataclass(frozen=True)
class Piece:
    """A job on the night line: from ``start`` to ``end`` percent of it."""

    id: str
    name: str
    start: float
    end: float
    ends: str
    running: bool
    done: int  # percent
    thumb: bool


@dataclass(frozen=True)
class Night:
    """What the page says of the whole queue."""

    title: str
    small: str  # before the clock
    clock: str
    state: str  # one word for the head
    alive: bool
    count: int
    paused: str | None  # since when, and by whom
    pieces: list[Piece]
    marks: list[tuple[str, float]]
    dawn: str | None
    more: int  # pieces that are not drawn
    takes: int | None  # seconds, as far as they are known of all
    needs: int
    told: list[str]  # what is wrong


@dataclass(frozen=True)
class Section:
    """A part of the progress bar."""

    done: int  # percent


def jobs_to_go(report: Report) -> list[Job]:
    """Give the jobs whose video is still to be made, in their order."""
    return [job for job in report["jobs"] if job["state"] in ("running", "queued") and not job["delivery"]]


def running(report: Report) -> list[Job]:
    """Give the jobs that are being made."""
    return [job for job in jobs_to_go(report) if job["state"] == "running"]


def stopped(report: Report) -> list[Job]:
    """Give the job in whose middle the queue was paused."""
    if not str(report["daemon"]["paused"] or "").startswith(BY_HAND):
        return []
    return [job for job in jobs_to_go(report)[:1] if job["state"] == "queued" and job["section"]]


def queued(report: Report) -> list[Job]:
    """Give the jobs that wait for their turn."""
    return [job for job in jobs_to_go(report) if job["state"] == "queued"]


def failed(report: Report) -> list[Job]:
    """Give the failures that nobody has seen to, the newest first."""
    return [job for job in report["jobs"] if job.get("open")]


def path_of(entry: JobReport | WaitingReport) -> str:
    """Name a job, or what waits, with its folder."""
    return text.path_of(entry["folder"], entry["name"])


def night(report: Report, now: datetime | None = None) -> Night:
    """Lay the queue along the night."""
    now = now or datetime.now(UTC)
    jobs = jobs_to_go(report)
    daemon = report["daemon"]
    held = daemon["paused"]
    paused = _pause(str(held)) if held and str(held).startswith(BY_HAND) else None
    takes = [job["eta_seconds"] for job in jobs]
    known = [seconds for seconds in takes if seconds is not None]
    together = _together(report, known)
    ends_at = report.get("finishes_at")
    whole = bool(jobs) and (ends_at is not None or len(known) == len(jobs))
    told = [str(problem["text"]) for problem in report["problems"]]
    told += [_delivery(job) for job in report["jobs"] if job["delivery"] and job["delivery"]["reason"]]
    if held and not paused:
        told.insert(0, str(held))
    if daemon.get("error"):
        told.insert(0, str(daemon["error"]))
    title, small, face = _words(len(jobs), paused is not None, together if whole else None, ends_at)
    return Night(
        title=title,
        small=small,
        clock=face,
        state=_state(report, paused is not None),
        alive=daemon["state"] == "running" and not paused,
        count=len(jobs),
        paused=paused,
        pieces=_pieces(jobs, takes),
        marks=_marks(together, now, by_clock=paused is None) if whole else [],
        dawn=face if whole and not paused else None,
        more=max(len(jobs) - PIECES, 0),
        takes=round(together) if whole else None,
        needs=len(report["waiting"]) + len(failed(report)),
        told=told,
    )


def _together(report: Report, takes: list[float]) -> float:
    """Give the seconds for the whole queue: several devices share it."""
    devices = at_work(report["daemon"])
    if devices < 2:
        return sum(takes)
    return report["eta_seconds"] or sum(takes) / devices


def _delivery(job: Job) -> str:
    """Say why the files of a job are not where they belong, and when that is tried again."""
    again = job["delivery"]["next_try"] if job["delivery"] else None
    when = f"; tried again at {text.clock(again, datetime.now(UTC), seconds=True)}" if again else ""
    return f"{path_of(job)}: {job['note']}{when}"


def _pause(said: str) -> str:
    """Say since when people paused the queue, on the clock of this place."""
    since = re.search(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}Z", said)
    return f"Since {clock(since[0])}" if since else "By hand"


def _words(count: int, paused: bool, takes: float | None, ends_at: str | None) -> tuple[str, str, str]:
    """Give the title, what stands before the clock, and the clock."""
    videos = f"{count} video{'' if count == 1 else 's'}"
    if not count:
        return ("Paused, and nothing waits" if paused else "Nothing to make"), "", "All quiet"
    if paused:
        return f"Paused, with {videos} to go", "still", span(takes) or "some time"
    if takes is None or ends_at is None:
        return f"{videos} to go", "", "The end is known soon"
    return f"{videos} to go", "all done", clock(ends_at)


def _state(report: Report, paused: bool) -> str:
    state = report["daemon"]["state"]
    if state != "running":
        return STATES.get(state, str(state))
    if paused:
        return "paused"
    return "computing" if running(report) else "ready"


def _pieces(jobs: list[Job], takes: list[float | None]) -> list[Piece]:
    """Give each job a piece as wide as it takes; where nobody knows, as wide as the others."""
    known = [seconds for seconds in takes if seconds]
    usual = sum(known) / len(known) if known else 1.0
    widths = [max(seconds if seconds is not None else usual, usual / 50) for seconds in takes]
    if len(jobs) > PIECES:
        widths = [*widths[:PIECES], max(sum(widths[PIECES:]), sum(widths) / 30)]
    total, at = sum(widths) or 1.0, 0.0
    pieces: list[Piece] = []
    for job, width in zip(jobs, widths, strict=False):
        start, at = at, at + width
        if len(pieces) < PIECES:
            pieces.append(_piece(job, start / total * 100, at / total * 100))
    return pieces


def _piece(job: Job, start: float, end: float) -> Piece:
    return Piece(
        id=job["id"],
        name=path_of(job),
        start=round(start, 1),
        end=round(end, 1),
        ends=clock(job["ends_at"]),
        running=job["state"] == "running",
        done=round((job["progress"] or 0.0) * 100),
        thumb=job["thumb"] is not None,
    )


def _marks(total: float, now: datetime, *, by_clock: bool) -> list[tuple[str, float]]:
    """Place times below the line: full hours, or spans from now where no time can be known."""
    minutes = next((m for m in STEPS_MINUTES if total / 60 / m <= MARKS), STEPS_MINUTES[-1])
    step = minutes * 60.0
    if total < 60:
        return []
    local = now.astimezone()
    midnight = local.replace(hour=0, minute=0, second=0, microsecond=0)
    gone = (local - midnight).total_seconds()
    first = step - gone % step if by_clock else step
    marks = []
    at = first
    while at < total:
        text = f"{local + timedelta(seconds=at):%H:%M}" if by_clock else span(at).replace(" 0 min", "")
        marks.append((text, round(at / total * 100, 1)))
        at += step
    return [(text, place) for text, place in marks if 7 < place < 86]


def sections(job: Job) -> list[Section]:
    """Give the parts of the bar in their order: FramePack fills them from the end, F1 from the start."""
    total, clips = max(job["sections"] or 1, 1), max(job["clips"] or 1, 1)
    here = max(job["section"] - 1, 0)
    if job["progress"] is not None:  # it runs: its decodes count
        share = job["progress"] * total - here
    else:
        share = job["step"] / job["steps"] if job["steps"] and job["section"] else 0.0
    step = round(100 * min(max(share, 0.0), 1.0))
    order = [Section(100 if at < here else step if at == here else 0) for at in range(total)]
    if job["kind"] == "f1":
        return order
    size = max(total // clips, 1)
    turned: list[Section] = []
    for start in range(0, total, size):
        turned += reversed(order[start : start + size])
    return turned


def so_far(job: Job) -> str | None:
    """Say which part of the video there is to be seen."""
    done, total, length = max(job["section"] - 1, 0), job["sections"], job["seconds"]
    if not done or not total or not length:
        return None
    made = f"{length * done / total:.1f} of {length:.1f} s"
    if job["clips"] > 1:
        return f"the first {made}"
    return f"the {'first' if job['kind'] == 'f1' else 'last'} {made}"


def where(job: Job) -> str:
    """Say in a line where a job is."""
    if job["state"] == "queued":
        return f"Section {job['section']}/{job['sections']}, waits at step {job['step']}/{job['steps']}"
    words = ", ".join(job["stage"] or ()) or str(job["note"] or "")
    pace = f", {job['step_seconds']:.1f} s a step" if job["step_seconds"] and "step" in words else ""
    return words[:1].upper() + words[1:] + pace
