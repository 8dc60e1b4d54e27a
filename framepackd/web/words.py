"""Says in HTML what the page shows of the queue."""

import html
from datetime import UTC, datetime

from framepackd.jobs.report import JobReport, Report, WaitingReport
from framepackd.text import clock, path_of, percent


def now(report: Report, running: JobReport | None) -> str:
    """Say what runs, what is wrong, and how much waits."""
    daemon = report["daemon"]
    lines = []
    if daemon["state"] != "running":
        stopped = "No daemon runs: what is in the queue waits until framepackd run is started."
        lines.append(f"<div>{html.escape(daemon.get('error', stopped))}</div>")
    if daemon["paused"]:
        lines.append(f"<div>Paused: {html.escape(daemon['paused'])}</div>")
    lines += [f"<div>Problem: {html.escape(problem['text'])}</div>" for problem in report["problems"]]
    if running is None:
        lines.append("<div>Nothing is being made.</div>")
    else:
        share, done = percent(running.get("progress") or 0.0), ends(running) or "…"
        lines += [
            f"<div class='name'>{html.escape(path(running))}</div>",
            f"<div class='bar'><div style='width: {share}%'></div></div>",
            f"<div>{share} %, {html.escape(progress(running))}, done {done}</div>",
        ]
    counts = [
        f"{report['counts'][state]} {state}"
        for state in ("queued", "waiting", "failed")
        if report["counts"].get(state)
    ]
    if (done := ends(report)) and report["counts"].get("queued"):
        counts.append(f"all done {done}")
    lines.append(f"<div class='small'>{', '.join(counts)}</div>")
    return "".join(lines)


def progress(job: JobReport) -> str:
    """Say where the running job is, and of another what a person should know."""
    words = ", ".join(job.get("stage") or ()) or job["note"] or ""
    when = job["delivery"] and job["delivery"]["next_try"]
    return f"{words}; tried again at {clock(when, datetime.now(UTC), seconds=True)}" if when else words


def ends(of: JobReport | Report) -> str:
    """Say at what time a job, or the queue, is done; empty where that cannot be predicted."""
    when = of.get("finishes_at")
    return clock(when, datetime.now(UTC)) if when else ""


def waiting(entries: list[WaitingReport]) -> str:
    """List what waits in the inbox, and for what."""
    if not entries:
        return ""
    lines = (
        f"<li>{html.escape(path(entry))}: {html.escape(entry.get('note', entry['missing']))}</li>"
        for entry in entries
    )
    return f"<p>In the inbox, not a job yet:</p><ul>{''.join(lines)}</ul>"


def note(job: JobReport) -> str:
    """Say of a job that has ended what a person should know."""
    looks = [f"looks {job['quality']}"] if job["quality"] else []
    return job["error"] or "; ".join([*looks, *job.get("warnings", ())])


def length(job: JobReport) -> str:
    """Say how long a video is."""
    return f"{job['frames'] / 30:.2f} s" if job["frames"] else ""


def path(of: JobReport | WaitingReport) -> str:
    """Name a job with its folder."""
    return path_of(of["folder"], of["name"])


def local(when: str | None) -> str:
    """Give a date and time as clocks here show it."""
    return f"{datetime.fromisoformat(when).astimezone():%Y-%m-%d %H:%M}" if when else ""
