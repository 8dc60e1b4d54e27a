"""Tells of a job what a person knows it by: its sentence, picture, size and model, and how it failed."""

import re
from collections.abc import Mapping

from framepackd.control.schedule import Place
from framepackd.jobs.job import ENDED, Job, State
from framepackd.jobs.report import FactsReport

# Codes of failures, by what their text says; the first that fits.
CODES = {
    "memory": re.compile(r"out of memory|does not fit|memory", re.IGNORECASE),
    "settings": re.compile(r"\.toml\b|must be |must have |unknown (key|setting)"),
    "prompt": re.compile(r"\bprompt\b|\.txt\b"),
    "picture": re.compile(r"\bpicture\b|\.(png|jpe?g|webp|bmp|heic|avif)\b", re.IGNORECASE),
    "model": re.compile(r"\bmodel\b|\bLoRA\b"),
}
REMEDIES = {
    "memory": "A smaller size needs less memory.",
    "settings": "Correct its settings file in the failed folder, then try again.",
    "prompt": "Correct its text in the failed folder, then try again.",
    "picture": "Put a whole picture in its place in the failed folder, then try again.",
    "model": "Look at framepackd check: it says what is missing.",
}


def facts_of(job: Job, kinds: Mapping[str, str], place: Place, device: str | None = None) -> FactsReport:
    """Give the facts of one job; ``kinds`` of each model, ``place`` in the queue, ``device`` if it runs."""
    settings = job.settings or {}
    model = settings.get("model")
    code = code_of(job.error) if job.state == State.FAILED else None
    return {
        "prompt": settings.get("prompt"),
        "width": job.width,
        "height": job.height,
        "seconds": round(job.frames / 30, 2) if job.frames else None,
        "seed": settings.get("seed"),
        "model": model,
        "draft": bool(settings.get("draft")),
        "final": (settings.get("final") or {}).get("id"),
        "kind": kinds.get(str(model)),
        "device": device or job.device,
        "step_seconds": job.step_seconds,
        "decode_seconds": job.decode_seconds,
        "saved_sections": 0 if job.state in ENDED else max(job.section - 1, 0),
        "thumb": _picture(job),
        "code": code,
        "remedy": REMEDIES.get(code) if code else None,
        "starts_at": place.starts_at,
        "ends_at": place.ends_at,
    }


def code_of(error: str | None) -> str:
    """Say of what kind a failure is.

    >>> code_of("the GPU ran out of memory three times")
    'memory'
    >>> code_of("market.toml: steps must be a number from 1 to 100")
    'settings'
    """
    return next((code for code, fits in CODES.items() if fits.search(error or "")), "other")


def _picture(job: Job) -> str | None:
    """Name the file of the picture that a job begins with, among its inputs."""
    for role in ("image", "frame-0"):
        entry = (job.inputs or {}).get(role)
        file = entry.get("file") if isinstance(entry, dict) else None
        if isinstance(file, str):
            return file
    return None
