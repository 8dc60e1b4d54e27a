"""Says in HTML what the page shows of the queue."""

import html
from datetime import UTC, datetime
from typing import Any

from framepackd.text import percent


def now(report: dict[str, Any], running: dict[str, Any] | None) -> str:
    """Say what runs, what is wrong, and how much waits."""
    daemon = report["daemon"]
    lines = []
    if daemon["state"] != "running":
        told = (
            daemon.get("error")
            or "No daemon runs: what is in the queue waits until framepackd run is started."
        )
        lines.append(f"<div>{html.escape(told)}</div>")
    if daemon.get("paused"):
        lines.append(f"<div>Paused: {html.escape(str(daemon['paused']))}</div>")
    lines += [f"<div>Problem: {html.escape(problem['text'])}</div>" for problem in report["problems"]]
    if running is None:
        lines.append("<div>Nothing is being made.</div>")
    else:
        share, ends = percent(running.get("progress") or 0.0), clock(running["eta_seconds"]) or "…"
        lines += [
            f"<div class='name'>{html.escape(path(running))}</div>",
            f"<div class='bar'><div style='width: {share}%'></div></div>",
            f"<div>{share} %, {html.escape(progress(running))}, done {ends}</div>",
        ]
    counts = [
        f"{report['counts'][state]} {state}"
        for state in ("queued", "waiting", "failed")
        if report["counts"].get(state)
    ]
    if report["eta_seconds"] and report["counts"].get("queued"):
        counts.append(f"all done {clock(report['eta_seconds'])}")
    lines.append(f"<div class='small'>{', '.join(counts)}</div>")
    return "".join(lines)


def progress(job: dict[str, Any]) -> str:
    """Say where the running job is, and of another what is to be known."""
    return ", ".join(job.get("stage") or ()) or str(job["note"] or "")


def waiting(entries: list[dict[str, Any]]) -> str:
    """List what waits in the inbox, and for what."""
    if not entries:
        return ""
    lines = (
        f"<li>{html.escape(path(entry))}: waits for {html.escape(entry['missing'])}</li>" for entry in entries
    )
    return f"<p>In the inbox, not a job yet:</p><ul>{''.join(lines)}</ul>"


def note(job: dict[str, Any]) -> str:
    """Say of a job what a person should know."""
    looks = [f"looks {job['quality']}"] if job["quality"] else []
    return job["error"] or "; ".join([*looks, *job.get("warnings", ())])


def length(job: dict[str, Any]) -> str:
    """Say how long a video is."""
    return f"{job['frames'] / 30:.2f} s" if job["frames"] else ""


def path(job: dict[str, Any]) -> str:
    """Name a job with its folder."""
    return "/".join(filter(None, (job["folder"], job["name"])))


def local(when: str | None) -> str:
    """Give a time as clocks here show it."""
    return f"{datetime.fromisoformat(when).astimezone():%Y-%m-%d %H:%M}" if when else ""


def clock(seconds: float | None) -> str:
    """Give the time at which something ends."""
    if seconds is None:
        return ""
    return f"{datetime.fromtimestamp(datetime.now(UTC).timestamp() + seconds, UTC).astimezone():%a %H:%M}"
