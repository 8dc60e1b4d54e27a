"""Draws the parts of the page that change by themselves, each as an event's HTML."""

from pathlib import Path
from typing import Any, cast

from framepackd.inbox.naming import is_picture, stem_of
from framepackd.jobs.folder import PREVIEW
from framepackd.jobs.report import JobReport, Report, WaitingReport
from framepackd.web import tonight
from framepackd.web.mending import wrong_setting
from framepackd.web.rendering import fragment
from framepackd.web.site import Shared

# What an older daemon, which an update has not ended yet, does not say.
UNSAID = (
    *("prompt", "width", "height", "seconds", "seed", "model", "draft", "kind", "device", "step_seconds"),
    *(
        "decode_seconds",
        "saved_sections",
        "progress",
        "stage",
        "warnings",
        "clips",
        "thumb",
        "code",
        "remedy",
        "starts_at",
        "ends_at",
        "reason",
    ),
)
FRESH = 8  # results that are shown as just finished


def of(report: Report, shared: Shared) -> dict[str, str]:
    """Draw all of them; the order is that in which a page replaces them."""
    shown = context(report, shared)
    drawn = {name: fragment(f"_{name}.html", **shown) for name in ("head", "line", "slim", "now")}
    for stage in shown["stages"]:
        drawn[f"stage-{stage['job']['id']}"] = fragment("_stage.html", **shown, stage=stage)
        drawn[f"preview-{stage['job']['id']}"] = fragment("_preview.html", **shown, stage=stage)
    return drawn | {name: fragment(f"_{name}.html", **shown) for name in ("queue", "needs", "fresh")}


def prepared(report: Report) -> Report:
    """Say of what an older daemon does not know that it is unknown."""
    unsaid = dict.fromkeys(UNSAID)
    lists = {"jobs": [unsaid | dict(job) for job in report["jobs"]]}
    lists["waiting"] = [unsaid | dict(entry) for entry in report["waiting"]]
    return cast("Report", {**report, **lists})


def context(report: Report, shared: Shared) -> dict[str, Any]:
    """Give what the templates show of a snapshot."""
    report = prepared(report)
    made = tonight.running(report) or tonight.stopped(report)
    queued = [job for job in tonight.queued(report) if job not in made]
    results = shared.gallery.newest(FRESH)
    return {
        "night": tonight.night(report),
        "stages": [stage(job, shared) for job in made],
        "queued": queued[: tonight.CARDS],
        "queued_count": len(queued),
        "waiting": waiting(report),
        "failed": [
            {**job, "wrong": wrong_setting(job["name"], job["error"])} for job in tonight.failed(report)
        ],
        "fresh": results,
        "token": shared.token,
        "path_of": tonight.path_of,
        "inbox": str(shared.config.inbox),
        "outbox": str(shared.config.outbox),
        "failed_folder": str(shared.config.failed),
        "daemon": report["daemon"],
        "model": report["daemon"]["model"] or shared.config.model,
    }


def waiting(report: Report) -> list[dict[str, Any]]:
    """Give the files that wait, with what a person can do about them here."""
    return [
        {**entry, "choice": choice(entry), "picture": missing_picture(entry)} for entry in report["waiting"]
    ]


def choice(entry: WaitingReport) -> list[str]:
    """Give the pictures of which only one may stay: of a chain those of one frame, and never an end frame."""
    alike: dict[str, list[str]] = {}
    for file in entry["files"]:
        if entry["reason"] == "several" and is_picture(file):
            alike.setdefault(stem_of(file), []).append(file)
    return next((files for files in alike.values() if len(files) > 1), [])


def missing_picture(entry: WaitingReport) -> str | None:
    """Name the picture that files wait for, if nothing else is missing."""
    waits = entry["reason"] in ("gap", "no_picture") and is_picture(entry["missing"])
    return entry["missing"] if waits else None


def stage(job: JobReport, shared: Shared) -> dict[str, Any]:
    """Give what the stage of a running job shows."""
    folder = shared.config.jobs_dir / job["id"]
    return {
        "job": job,
        "sections": tonight.sections(job),
        "so_far": tonight.so_far(job),
        "where": tonight.where(job),
        "video": _version(folder / PREVIEW),
        "latent": _version((folder / PREVIEW).with_suffix(".png")),
    }


def _version(path: Path) -> str | None:
    """Give a text that changes with a file; None if there is none."""
    try:
        return f"{path.stat().st_mtime_ns:x}"
    except OSError:
        return None
